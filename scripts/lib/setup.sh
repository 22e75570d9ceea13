# Shared by the scripts beside this folder: says what it does, installs packages, configures, builds.
# Source it from the root of the tree.

# Debian 12 and Ubuntu 24.04 name these alike.
QM_PACKAGES=(
  build-essential cmake ninja-build ccache pkg-config git
  libboost-dev libboost-filesystem-dev libboost-program-options-dev
  libyaml-cpp-dev libabsl-dev nlohmann-json3-dev libspdlog-dev zlib1g-dev
  libopenblas-dev libhwy-dev libpcre2-dev libutf8proc-dev libre2-dev
)
QM_TEST_PACKAGES=(libgtest-dev libgmock-dev libbenchmark-dev doxygen)

say() { printf '\n== %s\n' "$*"; }

die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# install_packages NAME...: installs what is missing, with sudo unless root.
install_packages() {
  local missing=() name
  for name in "$@"; do
    dpkg-query -W -f='${Status}' "$name" 2>/dev/null | grep -q 'install ok installed' || missing+=("$name")
  done
  if ((${#missing[@]} == 0)); then
    echo "all packages are there"
    return
  fi
  command -v apt-get >/dev/null || die "packages missing (${missing[*]}) and no apt-get; install them by hand, then run this again"
  local sudo=()
  if ((EUID != 0)); then
    command -v sudo >/dev/null || die "packages missing (${missing[*]}); run as root: apt-get install ${missing[*]}"
    sudo=(sudo)
  fi
  echo "installing: ${missing[*]}"
  "${sudo[@]}" apt-get update -qq
  "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
}

# nvcc is often installed outside PATH.
find_cuda() {
  if ! command -v nvcc >/dev/null && [[ -x /usr/local/cuda/bin/nvcc ]]; then
    export PATH=/usr/local/cuda/bin:$PATH
  fi
}

# The facts of a measurement as JSON members, for a command line. $QM_COMMIT stands in for git.
measurement_facts() {
  local processor commit
  commit=${QM_COMMIT:-$(git describe --always --dirty=-modified --abbrev=40 --exclude='*' 2>/dev/null || echo unknown)}
  processor=$(sed -n 's/^model name[[:space:]]*: //p' /proc/cpuinfo | head -1)
  printf '  "commit": "%s",\n' "$commit"
  printf '  "command": "%s",\n' "$1"
  if have_gpu; then
    printf '  "gpu": "%s",\n' "$(nvidia-smi --format=csv,noheader --query-gpu=name | head -1)"
    printf '  "driver": "%s",\n' "$(nvidia-smi --format=csv,noheader --query-gpu=driver_version | head -1)"
  fi
  printf '  "machine": {"processor": "%s", "cores": %d},\n' "${processor:-$(uname -m)}" "$(nproc)"
}

have_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; }

# Jobs in parallel: one a core, but no more than memory allows (2 GiB a compiler).
build_jobs() {
  local cores memory_gib
  cores=$(nproc)
  memory_gib=$(awk '/MemAvailable/ {print int($2 / 1048576)}' /proc/meminfo)
  local jobs=$((memory_gib / 2))
  ((jobs < 1)) && jobs=1
  ((jobs > cores)) && jobs=$cores
  echo "$jobs"
}
