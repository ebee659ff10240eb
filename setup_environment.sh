#!/usr/bin/env bash
# Make .venv and install what is needed, once per change of the requirement files.
#   ./setup_environment.sh runtime    what the program needs (CUDA extras too where there is an NVIDIA driver)
#   ./setup_environment.sh tests      also what the tests need
# TACO_TEMPLATE_PICTURES=no: without the preview pictures of the page's templates, which are large.
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")"

kind=${1:-runtime}
files=(requirements.txt)
if [ "$kind" = tests ]; then files+=(requirements_tests.txt); fi
# xfuser and other CUDA-only packages are optional engines: a failure to install them is said, not fatal.
cuda=no
if [ "$kind" = runtime ] && command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi >/dev/null 2>&1; then cuda=yes; fi

if [ ! -x .venv/bin/python ]; then
  python=${TACO_PYTHON:-python3}
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "TACO-DiT needs Python 3.11 or newer; set TACO_PYTHON to one" >&2
    exit 1
  }
  echo "TACO-DiT: first run, making .venv (this takes a few minutes)"
  "$python" -m venv .venv
fi

pictures=no
if [ "$kind" = runtime ]; then pictures=${TACO_TEMPLATE_PICTURES:-yes}; fi

stamp=.venv/installed-$kind
current=$(cat "${files[@]}" requirements_no_deps.txt requirements_taco_dit.txt requirements_template_pictures.txt \
  utils/torch_packages.py | cksum)-$cuda-$pictures
if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$current" ]; then
  # torch first and alone: with it in place nothing else asks for another build of it
  .venv/bin/python -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' requirements.txt)"
  for file in "${files[@]}"; do
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$file"
  done
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements_no_deps.txt
  # Packs take torchvision and torchaudio for granted; the program and its tests do without. A build that does not load
  # beside this torch is left out, which is said.
  if [ "$kind" = runtime ]; then .venv/bin/python -m utils.torch_packages install; fi
  if [ "$cuda" = yes ]; then
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements_taco_dit.txt ||
      echo "TACO-DiT: optional CUDA packages could not be installed; the native engine works without them"
  fi
  if [ "$pictures" = yes ]; then
    echo "TACO-DiT: fetching the pictures of the page's templates (about 600 MB; TACO_TEMPLATE_PICTURES=no skips them)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements_template_pictures.txt ||
      echo "TACO-DiT: the templates' pictures could not be installed; the page shows gradients in their place"
  fi
  echo "$current" >"$stamp"
fi

# The page is tested in a real browser. Without one those tests are skipped, and say so.
if [ "$kind" = tests ] && ! command -v chromium >/dev/null 2>&1 && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
  echo "TACO-DiT: installing chromium for the tests of the page"
  { apt-get update -qq && apt-get install -y -qq chromium; } >/dev/null 2>&1 ||
    echo "TACO-DiT: chromium could not be installed; tests of the page are skipped"
fi
