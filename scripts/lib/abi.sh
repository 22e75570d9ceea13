# Shared by the scripts about the plugin ABI. Source it from the root of the tree.
source scripts/lib/setup.sh

abi_temp=$(mktemp -d)
trap 'rm -rf "$abi_temp"' EXIT
abi_gate=$abi_temp/abi_gate

# Builds the gate with the headers as they are now.
build_abi_gate() {
  local gate=tests/abi
  "${CXX:-c++}" -std=c++20 -I. -Iplugin_api/include $gate/abi_gate.cc $gate/changelog.cc $gate/gate.cc \
    $gate/header_scan.cc $gate/layout.cc -o "$abi_gate" ||
    die "the headers or tests/abi/layout.cc do not compile"
}

# The folder of the latest release.
last_capsule() {
  local folder
  folder=$(ls -d tests/abi/released/*/ 2>/dev/null | sort -V | tail -1)
  [[ -n $folder ]] || die "tests/abi/released is empty; make one with scripts/abi_capsule VERSION"
  echo "${folder%/}"
}

# abi_library HEADERS LAYOUT OUT: a shared object whose debug information holds every struct of LAYOUT.
abi_library() {
  awk 'BEGIN {print "#include \"quantmill/all.h\""}
       $1 == "FROZEN" || $1 == "GROWABLE" {print "const " $2 "* abi_" $2 ";"}' "$2" >"$abi_temp/types.c"
  cc -std=c11 -g -fPIC -shared "-ffile-prefix-map=$abi_temp=." -I"$1" "$abi_temp/types.c" -o "$3"
}
