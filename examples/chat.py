"""Hold a conversation: each answer sees all earlier turns, and the KV cache is reused between them.

    python examples/chat.py [MODEL]

MODEL is a GGUF file, a folder or a Hugging Face repository; without it, the default model is used.
"""

import sys

from nybble import Model

QUESTIONS = ["Name a river in Europe.", "Which countries does it cross?"]

with Model.load(sys.argv[1] if len(sys.argv) > 1 else None) as model:
    session = model.session()
    messages = [{"role": "system", "content": "You answer in one short sentence."}]
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        answer = session.chat(messages, max_tokens=48, temperature=0)
        messages.append({"role": "assistant", "content": answer.text})
        usage = answer.usage
        print(f"> {question}\n{answer.text}\n({usage.cached_tokens} of {usage.prompt_tokens} prompt tokens reused)\n")
