#!/usr/bin/env bash
# Measures lora_jax on this machine's GPU or TPU; see benchmarks/devices/README.md.
# Flags are those of benchmarks/device.py. PYTHON: an environment that has what is needed.
# PEERS=1: also installs PEFT and bitsandbytes, to compare with.
set -euo pipefail
cd "$(dirname "$0")/.."

extras() { # the package's extras for this machine
  if command -v nvidia-smi > /dev/null; then
    driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -n 1)
    if [ "${driver%%.*}" -ge 580 ]; then echo test,cuda13; else echo test,cuda12; fi
  elif compgen -G "/dev/accel[0-9]*" > /dev/null || compgen -G "/dev/vfio/[0-9]*" > /dev/null; then
    echo test,tpu
  else
    echo test
  fi
}

installed() { # installed FOLDER PACKAGE...: an environment, complete or made anew
  [ -e "$1/complete" ] && return
  python3 -m venv --clear "$1"
  "$1/bin/python" -m pip install --quiet "${@:2}"
  touch "$1/complete"
}

if [ -z "${PYTHON:-}" ]; then
  installed .venv-device -e ".[$(extras)]"
  PYTHON=.venv-device/bin/python
fi
peers=()
if [ -n "${PEERS:-}" ]; then
  installed .venv-peers torch transformers peft accelerate bitsandbytes
  peers=(--peer-python .venv-peers/bin/python)
fi
exec "$PYTHON" benchmarks/device.py --spent "$SECONDS" "${peers[@]}" "$@"
