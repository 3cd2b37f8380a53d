"""Several models in one server: which there are, what each needs, and which of them are in memory.

| module | contents |
| --- | --- |
| `spec` | a model that the server offers, and where its name comes from |
| `sources` | the models of the command line, of a folder and of a configuration file |
| `config` | reads configuration files |
| `needs` | what a model takes in memory, before it is loaded |
| `names` | the model that a request asks for |
| `entry` | a model of the pool, loaded or not |
| `job` | loading and unloading in threads |
| `pool` | loads models on demand, and unloads those that were used least recently |
| `metrics` | how many are loaded, and how often |
"""
