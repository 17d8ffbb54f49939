//! Screens and consoles as real guests show them.

use super::*;

/// What the console shows, and what the screen.
fn of(console: Option<&str>, screen: Option<&str>) -> (Family, FailureKind, String) {
    let Class { family, kind, line } = classify(&Shown { console, screen, ..Shown::default() });
    (family, kind, line)
}

#[test]
fn every_kind_is_known_by_its_line() {
    for (text, family, kind, line) in [
        (
            "[    1.52] sysrq: Trigger a crash\n[    1.53] Kernel panic - not syncing: sysrq triggered crash\n\
             [    1.53] CPU: 0 PID: 71 Comm: sh Not tainted 6.1.0\n[    1.54] Rebooting in 0 seconds..",
            F::Linux,
            K::Panic,
            "Kernel panic - not syncing: sysrq triggered crash",
        ),
        (
            "<0>[ 1] Kernel panic - not syncing: VFS: Unable to mount root fs\n[ 1] ---[ end Kernel panic - not syncing: VFS: Unable to mount root fs ]---",
            F::Linux,
            K::Panic,
            "Kernel panic - not syncing: VFS: Unable to mount root fs",
        ),
        (
            "[ 9.1] Kernel panic - not syncing: Out of memory: compulsory panic_on_oom is enabled",
            F::Linux,
            K::OutOfMemory,
            "Kernel panic - not syncing: Out of memory: compulsory panic_on_oom is enabled",
        ),
        (
            "[ 9.1] Kernel panic - not syncing: System is deadlocked on memory",
            F::Linux,
            K::OutOfMemory,
            "Kernel panic - not syncing: System is deadlocked on memory",
        ),
        (
            "[ 5.0] BUG: unable to handle page fault for address: ffffdead\n[ 5.0] #PF: supervisor write access",
            F::Linux,
            K::Oops,
            "BUG: unable to handle page fault for address: ffffdead",
        ),
        (
            "[ 5.0] Oops: 0002 [#1] PREEMPT SMP NOPTI\n[ 5.0] RIP: x",
            F::Linux,
            K::Oops,
            "Oops: 0002 [#1] PREEMPT SMP NOPTI",
        ),
        ("[ 5.0] kernel BUG at mm/slub.c:305!", F::Linux, K::Oops, "kernel BUG at mm/slub.c:305!"),
        (
            "[ 26.1] watchdog: BUG: soft lockup - CPU#0 stuck for 22s! [sh:71]",
            F::Linux,
            K::Lockup,
            "watchdog: BUG: soft lockup - CPU#0 stuck for 22s! [sh:71]",
        ),
        (
            "[ 9] NMI watchdog: Watchdog detected hard LOCKUP on cpu 1",
            F::Linux,
            K::Lockup,
            "NMI watchdog: Watchdog detected hard LOCKUP on cpu 1",
        ),
        (
            "[ 21.0] rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:\n[ 21.0] rcu: 1-...0: (1 GPs behind)",
            F::Linux,
            K::Lockup,
            "rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:",
        ),
        (
            "[ 242.1] INFO: task jbd2/vda1-8:101 blocked for more than 120 seconds.",
            F::Linux,
            K::HungTask,
            "INFO: task jbd2/vda1-8:101 blocked for more than 120 seconds.",
        ),
        (
            ":(\nYour PC ran into a problem and needs to restart.\n\nStop code: CRITICAL_PROCESS_DIED\n",
            F::Windows,
            K::StopScreen,
            "Stop code: CRITICAL_PROCESS_DIED",
        ),
        ("  :(  \n20% complete", F::Windows, K::StopScreen, ":("),
        (
            "A problem has been detected and windows has been shut down to prevent damage\n\
             Technical information:\n*** STOP: 0x0000007B (0xF78D2524,0xC0000034)",
            F::Windows,
            K::StopScreen,
            "*** STOP: 0x0000007B (0xF78D2524,0xC0000034)",
        ),
        (
            "SeaBIOS (version 1.16.2)\nBooting from Hard Disk...\nBoot failed: not a bootable disk\n\nNo bootable device.",
            F::Boot,
            K::NoBootDevice,
            "No bootable device.",
        ),
        ("iPXE 1.21\nNo more network devices\n", F::Boot, K::NoBootDevice, "No more network devices"),
        (
            "BdsDxe: failed to load Boot0001 \"UEFI Misc Device\": Not Found",
            F::Boot,
            K::NoBootDevice,
            "BdsDxe: failed to load Boot0001 \"UEFI Misc Device\": Not Found",
        ),
        (
            "BdsDxe: No bootable option or device was found.",
            F::Boot,
            K::NoBootDevice,
            "BdsDxe: No bootable option or device was found.",
        ),
        (
            "error: no such partition.\nEntering rescue mode...\ngrub rescue> ",
            F::Boot,
            K::BootLoader,
            "error: no such partition.",
        ),
        ("error: of a boot before\nBooting from Hard Disk...\ngrub rescue> ", F::Boot, K::BootLoader, "grub rescue>"),
        ("Minimal BASH-like line editing is supported.\ngrub> ", F::Boot, K::BootLoader, "grub>"),
        ("\u{1b}[0m\u{1b}[1;1H  GNU GRUB  version 2.06\u{1b}[3;2H", F::Boot, K::BootLoader, "GNU GRUB  version 2.06"),
        (
            "ALERT!  /dev/vda1 does not exist.  Dropping to a shell!\n\n(initramfs) ",
            F::Linux,
            K::Initramfs,
            "(initramfs)",
        ),
        (
            "You are in emergency mode. After logging in, type \"journalctl -xb\"\nPress Enter",
            F::Linux,
            K::Emergency,
            "You are in emergency mode. After logging in, type \"journalctl -xb\"",
        ),
        (
            "Give root password for maintenance\n(or press Control-D to continue): ",
            F::Linux,
            K::Emergency,
            "Give root password for maintenance",
        ),
        ("Debian GNU/Linux 12 web1 ttyS0\n\nweb1 login: ", F::Unknown, K::Unknown, ""),
        ("[ 3.3] Out of memory: Killed process 71 (java)", F::Unknown, K::Unknown, ""),
        ("", F::Unknown, K::Unknown, ""),
    ] {
        let expected = (family, kind, line.to_owned());
        assert_eq!(of(Some(text), None), expected, "console: {text}");
        let rows: Vec<&str> = text.lines().map(|row| row.get(..COLUMNS - 1).unwrap_or(row)).collect();
        assert_eq!(of(None, Some(&rows.join("\n"))).1, kind, "screen: {text}");
    }
}

#[test]
fn the_newest_line_wins_and_an_earlier_boot_does_not_count() {
    let panic = "[ 1.5] Kernel panic - not syncing: old";
    for (text, kind) in [
        (format!("[ 1.0] Oops: 0002 [#1] SMP\n{panic}"), K::Panic),
        (format!("{panic}\nSeaBIOS (version 1.16.2)\nBooting from Hard Disk...\n"), K::Unknown),
        (format!("{panic}\n[ 0.0] Linux version 6.1.0 (gcc)\n[ 1.0] Run /init"), K::Unknown),
        (format!("{panic}\n[ 0.0] Linux version 6.1.0\n[ 9.0] Oops: 0000 [#1] SMP"), K::Oops),
        ("No bootable device.\nBooting from Hard Disk...\n".to_owned(), K::Unknown),
        ("BdsDxe: failed to load Boot0001\nBdsDxe: starting Boot0002\n".to_owned(), K::Unknown),
        ("GNU GRUB  version 2.06\n[ 3.0] done\nweb login: ".to_owned(), K::Unknown),
        ("[ 2.0] Oops: 0000 [#1] SMP\nweb login: ".to_owned(), K::Oops),
    ] {
        assert_eq!(of(Some(&text), None).1, kind, "{text}");
    }
}

#[test]
fn screen_and_console_together() {
    let (panic, menu) = ("Kernel panic - not syncing: x", "GNU GRUB  version 2.06");
    assert_eq!(of(Some(menu), Some(panic)).1, K::Panic, "the boot loader uses the console, the kernel does not");
    assert_eq!(of(Some(panic), Some(menu)).1, K::Panic);
    let row = format!("[ 1.5] Kernel panic - not syncing: {:x<45}", "");
    let (_, kind, line) = of(None, Some(&format!("{row}\nyz\n[ 1.5] CPU: 0")));
    assert_eq!((kind, line.ends_with("xyz"), row.len()), (K::Panic, true, COLUMNS), "a broken line is put together");
}

#[test]
fn what_else_is_known_counts_when_nothing_is_shown() {
    let debian = System { id: "debian".to_owned(), ..System::default() };
    let shown = Shown { system: Some(&debian), panicked: Some("panicked"), ..Shown::default() };
    let class = classify(&shown);
    assert_eq!((class.family, class.kind, class.line.as_str()), (F::Linux, K::Panic, "panicked"));
    assert_eq!(class.to_string(), "Linux panic");
    let with_line = Shown { screen: Some("Kernel panic - not syncing: x"), ..shown };
    assert_eq!(classify(&with_line).line, "Kernel panic - not syncing: x");
    let with_menu = Shown { screen: Some("GNU GRUB  version 2.06"), ..shown };
    assert_eq!(classify(&with_menu).kind, K::Panic);
    assert_eq!(classify(&Shown { reported: true, ..Shown::default() }).kind, K::Reported);
}

#[test]
fn what_a_terminal_would_obey_is_taken_out() {
    for (line, expected) in [
        ("\u{1b}[31mKernel\u{7} panic\u{1b}[0m\r", "Kernel panic"),
        ("\u{1b}]0;title\u{7}x", "]0;titlex"),
        ("\u{1b}[", ""),
        ("\u{9b}31mx", "31mx"),
        ("[link] x", "[link] x"),
        ("<3>[    0.5] x", "x"),
    ] {
        assert_eq!(clean(line), expected, "{line:?}");
    }
    assert_eq!(clean(&"ä".repeat(5000)).chars().count(), MAX_LINE);
}

#[test]
fn no_remedy_without_advice_and_no_advice_with_one() {
    for kind in FailureKind::ALL {
        assert_eq!(remedy_for(kind).is_none(), advice(kind).is_some(), "{kind:?}");
    }
}

#[test]
fn the_system_is_as_the_agent_says_or_the_definition() {
    let linux = System { id: "debian".to_owned(), ..System::default() };
    let silent = System::default();
    for (system, defined, expected) in [
        (None, Some("http://microsoft.com/win/10"), F::Windows),
        (None, Some("http://debian.org/debian/12"), F::Linux),
        (Some(&silent), Some("http://debian.org/debian/12"), F::Linux),
        (None, Some("http://freebsd.org/freebsd/14.0"), F::Unknown),
        (None, None, F::Unknown),
        (Some(&linux), Some("http://microsoft.com/win/10"), F::Linux),
    ] {
        let class = classify(&Shown { system, defined, ..Shown::default() });
        assert_eq!((class.family, class.kind), (expected, K::Unknown), "{defined:?}");
    }
}

#[test]
fn what_was_read_on_a_picture_is_known_in_spite_of_wrong_letters() {
    for (text, kind, line) in [
        (
            "A problem has been detected and Windows has been shut down\n\nseee STOP: OxOOO0007B (OxF78D2524 , OxCOO00034 )",
            K::StopScreen,
            "seee STOP: 0x0000007B (0xF78D2524 , 0xC0000034 )",
        ),
        ("xx STOP: 0xO000007B", K::StopScreen, "xx STOP: 0x0000007B"),
        ("Stop code: 1NACCESSIBLE_BOOT_DEVICE", K::StopScreen, "Stop code: 1NACCESSIBLE_BOOT_DEVICE"),
        (
            "[ 1.9] Kernel panic — not syncing: UFS: Unable to mount root fs on unkno",
            K::Panic,
            "Kernel panic — not syncing: UFS: Unable to mount root fs on unkno",
        ),
        (
            "GRUB loading.\nWelcome to GRUBt\nerror: unknoun filesystem.\nEntering rescue mode...\ngrub rescue>",
            K::BootLoader,
            "error: unknoun filesystem.",
        ),
        (
            "SeaBIOS (uersion 1.16.3)\n\nBoot failed: not a bootable disk\n\nNo bootab1e deuice.",
            K::NoBootDevice,
            "No bootab1e deuice.",
        ),
        ("welcome to 0x or Oxford", K::Unknown, ""),
    ] {
        let class = classify(&Shown { picture: Some(text), ..Shown::default() });
        assert_eq!((class.kind, class.line.as_str()), (kind, line), "{text}");
    }
    let (screen, picture) = (Some("grub>"), Some("Kernel panic - not syncing"));
    let both = classify(&Shown { screen, picture, ..Shown::default() });
    assert_eq!(both.kind, K::BootLoader, "a text screen says it exactly");
    let sign = Class { family: F::Windows, kind: K::StopScreen, line: "Stop code: X".to_owned() };
    assert_eq!(
        classify(&Shown { sign: Some(&sign), ..Shown::default() }),
        sign,
        "nothing is seen now: as it was found"
    );
    assert_eq!(classify(&Shown { sign: Some(&sign), screen, ..Shown::default() }).kind, K::BootLoader);
}
