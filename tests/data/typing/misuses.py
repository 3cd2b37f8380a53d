"""Mistakes that a type checker must refuse. Each line that ends in `# refused` has one, and no other line has."""

from __future__ import annotations

import nybble
from nybble import Engine, FinishReason, LoadOptions, Model, SamplingOptions, Tokenizer
from nybble import Modle  # refused
from nybble.sampling import SamplingOption  # refused

nybble.quantise("folder", "model.gguf")  # refused
nybble.evaluation  # refused
nybble.calibration  # refused
nybble.Any  # refused

Model("model.gguf")  # refused
Model()  # refused
Tokenizer("model.gguf")  # refused
Model.load("model.gguf", thread=4)  # refused
Model.load("model.gguf", threads="4")  # refused
Model.load("model.gguf", cache_type="int4")  # refused
Model.load("model.gguf", progress=5)  # refused
Model.load("model.gguf", progress=lambda stage, done, total: None)  # refused
LoadOptions("model.gguf")  # refused
SamplingOptions(temprature=0)  # refused
SamplingOptions(0.5)  # refused

model = Model.load("model.gguf")
model.generat("Once")  # refused
model.generate(5)  # refused
model.generate("Once", {"temperature": 0})  # refused
model.generate("Once", temprature=0)  # refused
model.generate("Once", temperature="0")  # refused
model.generate("Once", max_token=8)  # refused
model.generate("Once").txt  # refused
model.generate(["Once", "Twice"]).text  # refused
model.generate("Once")[0]  # refused
model.stream(["Once", "Twice"])  # refused
model.chat("Hello")  # refused
model.chat([{"role": "user", "content": "Hello"}], True)  # refused
model.chat([{"role": "user", "content": "Hello"}], stream=True).text  # refused
model.chat([{"role": "user", "content": "Hello"}], stream="yes")  # refused
model.session().chat([{"role": "user", "content": "Hello"}], stream=True).text  # refused
model.session().sav("file")  # refused
model.embed("Once", pooling="max")  # refused
model.tokenizer.encode("Once", False)  # refused
model.tokenizer.apply_chat_template([], False)  # refused
model.detokenize("Once")  # refused
model.info.contexts  # refused

reason: FinishReason = "finished"  # refused
nybble.quantize("folder", "model.gguf", recipe="gtpq")  # refused
nybble.quantize("folder", "model.gguf", progress=lambda done, total: None)  # refused
nybble.evaluate(model, "prose.txt", windows=512)  # refused
nybble.kernels("avx2")  # refused


async def requests() -> None:
    async with Engine("model.gguf") as engine:  # refused
        engine.submit(5)  # refused
        engine.submit("Once").results()  # refused
        for _ in engine.stream("Once"):  # refused
            pass
        await engine.generate("Once", max_toknes=8)  # refused
        Engine(model, max_batches=8)  # refused
        Engine(model, speculation="maybe")  # refused
