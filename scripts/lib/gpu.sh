# Shared by scripts/gpu_tests and scripts/gpu_bench: finding executables, libraries, data and the
# facts that go with every measurement. A "tree" is a build directory or a bundle made by
# scripts/gpu_bundle.

gpu_has_device() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU '; }

# gpu_open_tree TREE START: the directory to work in. TREE (relative to START) is a build directory or
# a bundle, which is unpacked once; empty: the current folder if it is either, else build/portable,
# else build/dev.
gpu_open_tree() {
  local tree=$1 candidate
  if [[ -n $tree && $tree != /* ]]; then tree=$2/$tree; fi
  if [[ -z $tree ]]; then
    for candidate in . build/portable build/dev; do
      if [[ -f $candidate/bundle.tar.xz || -f $candidate/CTestTestfile.cmake ]]; then
        tree=$candidate
        break
      fi
    done
  fi
  if [[ ! -d $tree ]]; then
    echo "error: no tree '$tree'; nothing built there; run cmake --preset portable and build it" >&2
    return 2
  fi
  if [[ -f $tree/bundle.tar.xz ]]; then
    if [[ ! -f $tree/unpacked/COMMIT || $tree/bundle.tar.xz -nt $tree/unpacked/COMMIT ]]; then
      rm -rf "$tree/unpacked"
      mkdir -p "$tree/unpacked"
      if command -v xz >/dev/null; then
        tar -xJf "$tree/bundle.tar.xz" -C "$tree/unpacked"
      else
        python3 -m tarfile -e "$tree/bundle.tar.xz" "$tree/unpacked"
      fi
      touch "$tree/unpacked/COMMIT"
    fi
    tree=$tree/unpacked
  fi
  (cd "$tree" && pwd)
}

# Sets LD_LIBRARY_PATH and QM_SHARED_DIR for a tree that brings its own libraries and data.
gpu_use_tree() {
  if [[ -d $1/lib/bundled ]]; then
    export LD_LIBRARY_PATH="$1/lib/bundled${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
  fi
  local folder
  for folder in "${CUDA_HOME:-/usr/local/cuda}"/{lib64,lib,targets/x86_64-linux/lib} /usr/local/cuda-13*/lib64; do
    if compgen -G "$folder/libcublas.so.*" >/dev/null; then
      export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$folder"
      break
    fi
  done
  if [[ -d $1/shared ]]; then export QM_SHARED_DIR="$1/shared"; fi
  if [[ -d $1/source ]]; then export QM_SOURCE_DIR="$1/source"; fi
  if [[ -f $1/lib/offenders/libqm_cuda_offender.so ]]; then
    export QM_PROGRAM="$1/bin/quantmill" QM_OFFENDER="$1/lib/offenders/libqm_cuda_offender.so"
  fi
  if [[ -d $1/lib/quantmill/plugins ]]; then
    export QUANTMILL_PLUGIN_PATH="${QUANTMILL_PLUGIN_PATH:-$1/lib/quantmill/plugins}"
  fi
}

# Executables of tests labelled gpu and of the plugins' tests, which hold CPU and GPU cases, one per
# line.
gpu_test_executables() {
  if [[ -f $1/CTestTestfile.cmake ]]; then
    {
      ctest --test-dir "$1" -L gpu -N -V 2>/dev/null |
        sed -n 's/^[0-9]*: Test command: "\{0,1\}\([^" ]*\).*/\1/p'
      find "$1/tests" -maxdepth 1 -type f -executable -name 'qm_*_test'
    } | sort -u
  else
    find "$1/tests" -maxdepth 1 -type f -executable 2>/dev/null | sort
  fi
}

gpu_benchmark_executables() { find "$1/bench" -maxdepth 1 -type f -name '*cuda_bench*' 2>/dev/null | sort; }

# Says which shared libraries the given executables miss; fails if there are any.
gpu_check_libraries() {
  local missing
  missing=$(ldd "$@" 2>/dev/null | sed -n 's/^[[:space:]]*\([^ ]*\) => not found.*/\1/p' | sort -u | tr '\n' ' ')
  if [[ -n $missing ]]; then
    echo "error: shared libraries missing: $missing; install the CUDA 13 libraries or add their folder to LD_LIBRARY_PATH" >&2
    return 1
  fi
}

# The commit of a tree: what a bundle says, $QM_COMMIT, or git's answer.
gpu_commit() {
  if [[ -f $1/COMMIT ]]; then
    cat "$1/COMMIT"
  elif [[ -n ${QM_COMMIT:-} ]]; then
    echo "$QM_COMMIT"
  else
    local dirty=""
    [[ -z $(git status --porcelain 2>/dev/null) ]] || dirty="-modified"
    echo "$(git rev-parse HEAD 2>/dev/null || echo unknown)$dirty"
  fi
}

# Text as a JSON string.
gpu_json() { printf '"%s"' "$(printf '%s' "$1" | sed 's/\\/\\\\/g; s/"/\\"/g' | tr '\n' ' ')"; }

# The facts of a run as JSON members, for a tree and a command line.
gpu_facts() {
  local query="nvidia-smi --format=csv,noheader --query-gpu"
  printf '  "gpu": %s,\n' "$(gpu_json "$($query=name | head -1)")"
  printf '  "driver": %s,\n' "$(gpu_json "$($query=driver_version | head -1)")"
  printf '  "commit": %s,\n' "$(gpu_json "$(gpu_commit "$1")")"
  printf '  "command": %s,\n' "$(gpu_json "$2")"
}
