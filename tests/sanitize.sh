#!/usr/bin/env bash
# Builds the extension with a sanitizer beside the normal one and runs its tests in it: `make sanitize`.
#   tests/sanitize.sh address,undefined|thread
set -euo pipefail
cd "$(dirname "$0")/.."
kinds=$1
build=build/sanitize-${kinds%%,*}
FASTEMA_SANITIZE=$kinds .venv/bin/python setup.py -q build --build-base "$build" --build-lib "$build/lib"

runtime=$(g++ -print-file-name="lib${kinds%%,*}.so")
case $kinds in
address*) runtime="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)" ;;
thread) runtime=$(g++ -print-file-name=libtsan.so) ;;
esac
# Python and torch keep memory until they exit; gcc's OpenMP runtime is not built for ThreadSanitizer.
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export TSAN_OPTIONS="halt_on_error=1 suppressions=$PWD/tests/tsan.supp ignore_noninstrumented_modules=1"
LD_PRELOAD=$runtime .venv/bin/python -c "
import sys
sys.path[:0] = ['$build/lib', 'tests']
import fastema, pytest
assert '$build' in fastema.__file__, fastema.__file__
names = ('exchange', 'shadow', 'update', 'several_decays', 'capturable', 'peer_bugs')
sys.exit(pytest.main(['-q', '-k', 'not torch]', '-p', 'no:cacheprovider', '-o', 'pythonpath=',
                      *(f'tests/test_{name}.py' for name in names)]))
"
