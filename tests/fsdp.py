"""FSDP2 on CPU, for tests alone: accelerate picks FSDP only on accelerator devices, so its state is told after the fact."""

import os

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

import model


def use_fsdp2(*modules, cpu_ram_efficient_loading=False, mixed_precision=None):
    """A `before` for tiny.run_program: the modules' make_accelerator then gives an Accelerator that shards with FSDP2 over gloo.

    cpu_ram_efficient_loading, mixed_precision: as in a launch file of configs/.
    """

    def before():
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": str(cpu_ram_efficient_loading).lower()}
        if mixed_precision:
            os.environ["ACCELERATE_MIXED_PRECISION"] = mixed_precision
        for module in modules:
            module.make_accelerator = sharded(module.make_accelerator)

    def sharded(make_accelerator):
        def make(*args, **more):
            accelerator = make_accelerator(*args, **more)
            if accelerator.num_processes > 1:
                plugin = FullyShardedDataParallelPlugin(
                    fsdp_version=2, auto_wrap_policy="transformer_based_wrap", state_dict_type="FULL_STATE_DICT", cpu_ram_efficient_loading=cpu_ram_efficient_loading
                )
                plugin.set_mixed_precision(mixed_precision) if mixed_precision not in (None, "no") else None
                model.shard_in_float32(plugin)
                for state in (PartialState._shared_state, AcceleratorState._shared_state):
                    state["distributed_type"] = DistributedType.FSDP
                AcceleratorState._shared_state["fsdp_plugin"] = plugin
            return accelerator

        return make

    return before
