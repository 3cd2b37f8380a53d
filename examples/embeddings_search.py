"""Search documents by meaning, with embeddings and a dot product.

    python examples/embeddings_search.py [MODEL]

Use a model that was trained for embeddings, with the pooling that its card asks for. Others distinguish meanings only
roughly. Without MODEL, the default model is used.
"""

import sys

import numpy as np

from nybble import Model

DOCUMENTS = [
    "How to bake bread with a sourdough starter.",
    "The tax return is due at the end of May.",
    "A sailing boat needs wind and a good crew.",
    "Yeast makes dough rise when it is warm.",
]
QUERY = "baking a loaf"

with Model.load(sys.argv[1] if len(sys.argv) > 1 else None) as model:
    vectors = model.embed(DOCUMENTS, pooling="mean")  # (documents, hidden_size), rows of length 1
    (query,) = model.embed(QUERY, pooling="mean")
    scores = vectors @ query
    for index in np.argsort(-scores):
        print(f"{scores[index]:.3f}  {DOCUMENTS[index]}")
