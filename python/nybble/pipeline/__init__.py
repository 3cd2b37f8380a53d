"""One model over several processes: each stage holds some of the layers, and rows go from stage to stage.

`processes` starts the stages on this machine. `nybble.integrations.ray.pipeline` starts them on the machines of a Ray
cluster.
"""

from nybble.pipeline.engine import Pipeline, processes

__all__ = ["Pipeline", "processes"]
