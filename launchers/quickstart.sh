#!/usr/bin/env bash
# From a fresh checkout to an exported model: environment, shards, training on two ranks (killed half-way, resumed),
# export, evaluation, reload with stock transformers, report. Completed stages are skipped.
#
#   bash launchers/quickstart.sh [section.key=value …]       overrides of launchers/quickstart.yaml
#
# Environment: PYTHON            the Python to make .venv with
#              M3I_EMOJI_FOLDER  folder of the shards, made if it does not exist (data/emoji)
#              M3I_NOTO_FONT     path of NotoColorEmoji.ttf, if apt-get cannot fetch it
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launchers/_environment.sh

export M3I_EMOJI_FOLDER="${M3I_EMOJI_FOLDER:-data/emoji}"
font_package=fonts-noto-color-emoji

# The art comes from npm and Debian packages; shards that exist need neither.
check_packages() {
  [ -f "$M3I_EMOJI_FOLDER/train/manifest.json" ] && return 0
  need npm "fetches three of the four emoji styles" "apt-get install npm"
  if [ -n "${M3I_NOTO_FONT:-}" ]; then
    [ -f "$M3I_NOTO_FONT" ] || errors+=("no file M3I_NOTO_FONT=$M3I_NOTO_FONT"$'\n'"  fix: give the path of a NotoColorEmoji.ttf")
    return 0
  fi
  local other="M3I_NOTO_FONT=/path/to/NotoColorEmoji.ttf bash $0"
  need apt-get "fetches the fourth emoji style, package $font_package" "$other"
  need dpkg-deb "unpacks the fourth emoji style" "$other"
  command -v apt-cache >/dev/null 2>&1 || return 0
  if ! apt-cache show "$font_package" >/dev/null 2>&1; then
    [ "$(id -u)" = 0 ] && apt-get update -qq >&2 && apt-cache show "$font_package" >/dev/null 2>&1 && return 0
    errors+=("apt does not know the package $font_package"$'\n'"  fix: sudo apt-get update, or $other")
  fi
}

find_python
check_venv
check_compiler
check_packages
if [ -x .venv/bin/deepspeed ]; then check_disk 2; else check_disk 6; fi
report_errors

install_into_venv quickstart -r requirements.txt
export PATH="$PWD/.venv/bin:$PATH" # ninja, for DeepSpeed's build
need ninja "DeepSpeed builds with it" ".venv/bin/python -m pip install ninja"
report_errors
build_extensions
exec .venv/bin/python launchers/_quickstart.py "$@"
