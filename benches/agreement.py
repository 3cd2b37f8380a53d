#!/usr/bin/env python3
"""Compare nybble's logits with llama.cpp's, token by token, on the same file and text.

    python benches/agreement.py model.gguf text.txt [--tokens 2000] [--window 512] [--kernel NAME]

Needs `pip install llama-cpp-python`. Both read the text in independent windows. Prints the share of positions with
the same top token, the mean Kullback-Leibler divergence KL(llama.cpp || nybble) in nats, and both perplexities. Exits
with 1 if `--min-agreement` or `--max-kl` is violated.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float64]


def log_softmax(logits: npt.NDArray[np.float32]) -> Logits:
    """Log probabilities (positions, vocabulary) in double precision."""
    x = logits.astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    x -= np.log(np.exp(x).sum(axis=1, keepdims=True))
    return x


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=2000, help="number of tokens to compare")
    parser.add_argument("--window", type=int, default=512, help="tokens per window")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--kernel", default=None)
    parser.add_argument("--min-agreement", type=float, default=0.0, help="minimum share of equal top tokens")
    parser.add_argument("--max-kl", type=float, default=float("inf"), help="maximum mean divergence in nats")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    from llama_cpp import Llama

    from nybble import Model

    model = Model.load(options.model, threads=options.threads, kernel=options.kernel)
    peer = Llama(
        str(options.model),
        n_ctx=options.window,
        n_batch=options.window,
        n_threads=options.threads,
        logits_all=True,
        verbose=False,
    )
    ids = model.tokenize(options.text.read_text())[: options.tokens]
    same, divergence, losses, peer_losses = [], [], [], []
    for start in range(0, len(ids), options.window):
        window = ids[start : start + options.window]
        ours = log_softmax(model.logits(window))
        peer.reset()
        peer.eval(window)
        theirs = log_softmax(peer.scores[: len(window)])
        same.append(ours.argmax(axis=1) == theirs.argmax(axis=1))
        divergence.append((np.exp(theirs) * (theirs - ours)).sum(axis=1))
        following = np.array(window[1:])
        losses.append(-ours[np.arange(len(following)), following])
        peer_losses.append(-theirs[np.arange(len(following)), following])

    result = {
        "tokens": len(ids),
        "equal_top_tokens": float(np.concatenate(same).mean()),
        "mean_kl": float(np.concatenate(divergence).mean()),
        "max_kl": float(np.concatenate(divergence).max()),
        "perplexity": float(np.exp(np.concatenate(losses).mean())),
        "peer_perplexity": float(np.exp(np.concatenate(peer_losses).mean())),
    }
    if options.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:>18}  {value:.6g}")
    passed = result["equal_top_tokens"] >= options.min_agreement and result["mean_kl"] <= options.max_kl
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
