#!/bin/sh
# Fuzzes one target with coverage, on the stable compiler and without cargo-fuzz: fuzz/run.sh TARGET [SECONDS], 600 by default.
# Needs g++ (libFuzzer is C++). It goes on from fuzz/corpus/TARGET (of this machine) and fuzz/seeds/TARGET (of the repository);
# what fails is written to fuzz/artifacts/TARGET. Put such a file into fuzz/seeds/TARGET, and the tests play it.
set -eu
cd "$(dirname "$0")"
target=${1:?usage: fuzz/run.sh TARGET [SECONDS]}
seconds=${2:-600}
machine=$(rustc -vV | sed -n 's/^host: //p')
coverage="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4"
coverage="$coverage -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table"
coverage="$coverage -Cllvm-args=-sanitizer-coverage-trace-compares --cfg fuzzing"
# With a named machine, build scripts and macros are built without coverage.
RUSTFLAGS="$coverage" cargo build --target "$machine" --bin "$target"
mkdir -p "corpus/$target" "artifacts/$target" "seeds/$target"
exec "${CARGO_TARGET_DIR:-target}/$machine/debug/$target" -max_total_time="$seconds" -rss_limit_mb=512 -timeout=20 \
    -max_len=8192 -print_final_stats=1 -artifact_prefix="artifacts/$target/" "corpus/$target" "seeds/$target"
