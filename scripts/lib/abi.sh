# Shared by the scripts about the plugin ABI. Source it from the root of the tree.
source scripts/lib/setup.sh

abi_temp=$(mktemp -d)
trap 'rm -rf "$abi_temp"' EXIT
abi_gate=${QM_ABI_GATE:-$abi_temp/abi_gate}

# Builds the gate, unless $QM_ABI_GATE names one.
build_abi_gate() {
  [[ -n ${QM_ABI_GATE:-} ]] || "${CXX:-c++}" -std=c++20 -I. tests/abi/{abi_gate,changelog,gate,header_scan}.cc -o "$abi_gate"
}

# print_layout OUT: the layout of the headers as they are now.
print_layout() {
  "${CXX:-c++}" -std=c++20 -I. -Iplugin_api/include tests/abi/{print_layout,layout}.cc -o "$abi_temp/print_layout" ||
    die "the headers or tests/abi/layout.cc do not compile"
  "$abi_temp/print_layout" >"$1"
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
