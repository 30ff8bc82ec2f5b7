"""llama.cpp's server with a GGUF file, from the package xllamacpp, on 127.0.0.1 until it is killed.

``python tests/llama_server.py FILE NAME PORT``: as ``llama-server -m FILE --alias NAME --port PORT -c 4096 -np 4
--top-k 0 --min-p 0``, in one thread.
"""

from __future__ import annotations

import sys
import threading

from xllamacpp import CommonParams, Server


def main(file: str, name: str, port: str) -> None:
    params = CommonParams()
    params.model.path, params.model_alias = file, {name}
    params.n_ctx, params.n_parallel = 4096, 4
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.sampling.top_k, params.sampling.min_p = 0, 0.0
    params.port = int(port)
    _server = Server(params)  # listens as long as the object lives
    threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
