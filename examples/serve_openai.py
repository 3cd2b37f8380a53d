"""Start a server and talk to it with OpenAI's client.

    python examples/serve_openai.py [MODEL]

MODEL is a GGUF file, a folder or a Hugging Face repository; without it, the default model is used.

In practice the server runs by itself: `nybble serve MODEL`.
"""

import os
import subprocess
import sys

from openai import OpenAI

PORT = os.environ.get("PORT", "8765")
URL = f"http://127.0.0.1:{PORT}"

command = [sys.executable, "-m", "nybble", "serve", *sys.argv[1:2], "--port", PORT, "--name", "model"]
server = subprocess.Popen(command)
try:
    client = OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=20)  # retries until the model is loaded
    stream = client.chat.completions.create(
        model="model",
        messages=[{"role": "user", "content": "Name three rivers."}],
        stream=True,
        max_tokens=48,
        seed=1,
        extra_body={"top_k": 20},  # nybble's own sampling options
    )
    for chunk in stream:
        for choice in chunk.choices:
            print(choice.delta.content or "", end="", flush=True)
    print()
    embedding = client.embeddings.create(model="model", input="a small boat", encoding_format="float")
    print(len(embedding.data[0].embedding), "numbers in an embedding")
finally:
    server.terminate()  # running answers finish first
    server.wait()
