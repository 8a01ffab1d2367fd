"""Routed (grouped) linear layers and SwiGLU for tokens that belong to one of a few experts. Depends on jax alone.

routing = make_routing(expert_ids)                       # once per batch and shard, shared by all layers
y = routed_linear(x, (text_kernel, visual_kernel), routing)
y = routed_swiglu(x, (text_ffn, visual_ffn), routing)    # each ffn = (gate, up, down)
"""

from pallas_kernels.api import Implementation, routed_linear, routed_swiglu
from pallas_kernels.routing import Routing, make_routing

__all__ = ["Implementation", "Routing", "make_routing", "routed_linear", "routed_swiglu"]
