"""Print text while the model generates it, and stop early.

    python examples/streaming.py [MODEL]

MODEL is a GGUF file, a folder or a Hugging Face repository; without it, the default model is used.
"""

import sys

from nybble import Model

with Model.load(sys.argv[1] if len(sys.argv) > 1 else None) as model:
    stream = model.stream("Once upon a time", max_tokens=64, stop=["\n\n"], seed=7)
    for piece in stream:
        print(piece, end="", flush=True)
    done = stream.completion
    print(f"\n{done.finish_reason}: {done.timings.decode_tokens_per_second:.0f} tokens per second")
