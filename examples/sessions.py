"""Keep a long prompt in the KV cache, on disk, and continue from it in several ways.

    python examples/sessions.py [MODEL]

MODEL is a GGUF file, a folder or a Hugging Face repository; without it, the default model is used.
"""

import sys
import tempfile
from pathlib import Path

from nybble import Model

PROMPT = "The lighthouse keeper climbed the stairs, as on every evening. Below him the sea was calm. He lit the lamp"

with Model.load(sys.argv[1] if len(sys.argv) > 1 else None) as model, tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "keeper.session"
    session = model.session()
    print(PROMPT + session.generate(PROMPT, max_tokens=16, temperature=0).text)
    session.save(path)
    print(f"saved {len(session)} tokens in {path.stat().st_size / 1e6:.1f} MB")

    # A later process would start here. No token of the prompt is computed again.
    for continuation in (" Then", " But"):
        branch = model.load_session(path)
        answer = branch.generate(continuation, max_tokens=16, temperature=0)
        print(f"...{continuation}{answer.text} ({answer.usage.cached_tokens} tokens reused)")

    # In one process, forks share the memory of their common tokens.
    fork = session.fork()
    print("..." + fork.generate(" Suddenly", max_tokens=16, temperature=0).text)
