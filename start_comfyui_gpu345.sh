#!/usr/bin/env bash
# Start ComfyUI on several GPUs for one picture. The first run sets everything up.
#
#   ./start_comfyui_gpu345.sh                      GPUs 3, 4, 5 where they exist, else all there are; port 12215
#   TACO_GPUS=0,1 ./start_comfyui_gpu345.sh        these GPUs; CUDA_VISIBLE_DEVICES chooses, too
#   TACO_LISTEN=127.0.0.1 ./start_comfyui_gpu345.sh    only this machine may connect
#   ./start_comfyui_gpu345.sh --cpu --taco-ranks 2     every further argument goes to main.py
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")"

./setup_environment.sh runtime

listen=${TACO_LISTEN:-0.0.0.0}
case " $* " in
  *" --listen "* | *" --listen="*) ;;
  *)
    if [ "$listen" = 0.0.0.0 ]; then
      if [ -n "${TACO_TOKEN:-}" ] || [[ " $* " == *" --auth-token"* ]]; then
        echo "TACO-DiT: listening on all addresses, to those who know the token; TACO_LISTEN=127.0.0.1 restricts it to this machine"
      else
        echo "TACO-DiT: listening on all addresses: anyone on your network can use this server; TACO_LISTEN=127.0.0.1 restricts it to this machine"
        echo "TACO-DiT: to set a password: export TACO_TOKEN=\$(openssl rand -hex 16); echo \$TACO_TOKEN; and start again"
      fi
    fi
    set -- --listen "$listen" "$@"
    ;;
esac
case " $* " in
  *" --port "* | *" --port="*) ;;
  *) set -- --port 12215 "$@" ;;
esac
case " $* " in
  *" --gpus "* | *" --gpus="* | *" --prefer-gpus "* | *" --prefer-gpus="* | *" --cpu "*) ;;
  *)
    # main.py puts CUDA_VISIBLE_DEVICES before --prefer-gpus, and --gpus before both.
    if [ -n "${TACO_GPUS:-}" ]; then
      set -- --gpus "$TACO_GPUS" "$@"
    else
      set -- --prefer-gpus 3,4,5 "$@"
    fi
    ;;
esac
exec .venv/bin/python main.py "$@"
