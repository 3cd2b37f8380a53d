"""Several models in one server: which there are, what each needs, and which of them are in memory.

| module | contents |
| --- | --- |
| `spec` | a model that the server offers, and where its name comes from |
| `sources` | the models of the command line and of a folder, and the pool of all |
| `config` | the models of a configuration file |
| `needs` | what a model takes in memory, before it is loaded |
| `faults` | errors of models that cannot be loaded |
| `names` | the model that a request asks for |
| `entry` | a model of the pool, loaded or not |
| `job` | loading and unloading in threads |
| `pool` | loads models on demand, and unloads those that were used least recently |
| `metrics` | how many are loaded, and how often |
"""
