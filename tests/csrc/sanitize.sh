#!/usr/bin/env bash
# Builds the extension with a sanitizer beside the normal one and runs its tests in it: `make sanitize`.
#   tests/csrc/sanitize.sh address,undefined|thread
set -euo pipefail
cd "$(dirname "$0")/../.."
kinds=$1
build=build/sanitize-${kinds%%,*}
FASTEMA_SANITIZE=$kinds .venv/bin/python setup.py -q build --build-base "$build" --build-lib "$build/lib"

runtime=$(g++ -print-file-name="lib${kinds%%,*}.so")
case $kinds in
address*)
  runtime="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)"
  tests="swap/test_exchange shadow/test_shadow shadow/test_update decay/test_several_decays decay/test_capturable
         test_peer_bugs test_faults test_threads"
  ;;
thread)
  runtime=$(g++ -print-file-name=libtsan.so)
  tests="shadow/test_update swap/test_exchange decay/test_several_decays test_threads"
  export OMP_NUM_THREADS=2 # conftest.py sets 1 otherwise
  ;;
esac
# Python and torch keep memory until they exit; gcc's OpenMP runtime is not built for ThreadSanitizer.
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export TSAN_OPTIONS="halt_on_error=1 suppressions=$PWD/tests/csrc/tsan.supp ignore_noninstrumented_modules=1"
LD_PRELOAD=$runtime .venv/bin/python -c "
import sys
sys.path[:0] = ['$build/lib', 'tests']
import fastema, pytest
assert '$build' in fastema.__file__, fastema.__file__
# Left out: the torch backend, where nothing of ours is compiled; and forks, whose children load another build.
sys.exit(pytest.main(['-q', '-k', 'not torch and not fork', '-p', 'no:cacheprovider', '-o', 'pythonpath=',
                      '--durations=5', *(f'tests/core/{name}.py' for name in '''$tests'''.split())]))
"

if [ "$kinds" = thread ]; then # the host side of a GPU, on a device whose streams are threads: a missing wait is a report
  LD_PRELOAD=$runtime FASTEMA_SANITIZE=thread FASTEMA_TEST_ACCELERATOR=kernels PYTHONPATH="$build/lib:tests" OMP_NUM_THREADS=1 \
    .venv/bin/python -m pytest -q -p accelerator.plugin -p no:cacheprovider --durations=5 \
    tests/accelerator/test_on_races.py tests/accelerator/test_on_fastema.py
fi
