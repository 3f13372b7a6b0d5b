# Sourced by the launchers: find Python, make .venv, install into it, and say at once what is missing and how to fix it.

errors=()

# Extensions belong to one environment: two that share a folder would build each other's anew, in turn.
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$PWD/.venv/torch_extensions}"

# need COMMAND "why" "command that installs it"
need() {
  command -v "$1" >/dev/null 2>&1 || errors+=("$1 is missing ($2)"$'\n'"  fix: $3")
}

# Prints all errors found so far and exits with code 2, the exit code of errors that the user can fix.
report_errors() {
  [ ${#errors[@]} -eq 0 ] && return 0
  printf 'error: this machine is not ready\n' >&2
  printf -- '- %s\n' "${errors[@]}" >&2
  exit 2
}

fits_python() {
  "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2])' >/dev/null 2>&1
}

# Sets $python: $PYTHON where it is set, else the first of the usual names that is 3.10 or newer.
find_python() {
  local name
  python=""
  for name in ${PYTHON:-python3 python python3.13 python3.12 python3.11 python3.10}; do
    if fits_python "$name"; then python="$name"; return 0; fi
  done
  errors+=("no Python 3.10 or newer${PYTHON:+ at PYTHON=$PYTHON}"$'\n'"  fix: apt-get install python3 python3-dev python3-venv, or PYTHON=/path/to/python3 bash $0")
}

# Compilers and headers for DeepSpeed's extensions, which are built at their first use.
check_compiler() {
  need "${CXX:-g++}" "DeepSpeed builds extensions at first use" "apt-get install g++"
  [ -z "$python" ] && return 0
  if ! "$python" -c 'import os, sysconfig; open(os.path.join(sysconfig.get_paths()["include"], "Python.h")).close()' 2>/dev/null; then
    errors+=("Python.h is missing (DeepSpeed's extensions include it)"$'\n'"  fix: apt-get install python3-dev")
  fi
}

# check_disk GIGABYTES: free space where the checkout lies.
check_disk() {
  local free_kb
  free_kb=$(df -Pk . | awk 'NR == 2 { print $4 }')
  if [ "$free_kb" -lt $(($1 * 1000 * 1000)) ]; then
    errors+=("$((free_kb / 1000000)) GB of disk are free below $PWD, $1 GB are needed"$'\n'"  fix: free some space, or clone to a larger disk")
  fi
}

# The modules behind `python -m venv`; Debian packs them apart from Python.
check_venv() {
  if [ -x .venv/bin/python ]; then
    .venv/bin/python -m pip --version >/dev/null 2>&1 || errors+=("$PWD/.venv is broken"$'\n'"  fix: rm -rf $PWD/.venv, and start again")
  elif [ -n "$python" ] && ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
    errors+=("'$python -m venv' does not work here"$'\n'"  fix: apt-get install python3-venv")
  fi
}

# install_into_venv STAMP REQUIREMENT…: makes .venv where there is none, and installs unless nothing has changed since.
install_into_venv() {
  local stamp=".venv/.$1" now
  shift
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  now=$(.venv/bin/python -V; echo "$PWD" "$@"; cat requirements.txt pyproject.toml)
  if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$now" ]; then return 0; fi
  echo "installing into .venv: pip install $*" >&2
  .venv/bin/python -m pip install --disable-pip-version-check --quiet "$@"
  printf '%s\n' "$now" >"$stamp"
}

# build_extensions: once, here, instead of before the first step.
build_extensions() {
  [ -d "$TORCH_EXTENSIONS_DIR" ] && return 0
  echo "building DeepSpeed's extensions (once)" >&2
  .venv/bin/python launchers/_build.py >&2
}
