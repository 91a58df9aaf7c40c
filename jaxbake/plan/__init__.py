"""Plans before anything is rented: the real programs, compiled for a TPU that is not there.

    from jaxbake.plan import make_plan, request_for
    plan = make_plan(request_for("v5e:4x4", model="meta-llama/Llama-3.1-8B", mesh="fsdp=16"))
    plan.asked["online"].memory.peak, plan.asked["online"].cycles, plan.best

Needs the TPU compiler, libtpu: `pip install 'jaxbake[plan]'`. With it installed, set JAX_PLATFORMS=cpu for everything
else on a machine without a TPU; planning does so by itself.
"""

from jaxbake.plan.figures import Case, Figures, Memory, Plan
from jaxbake.plan.request import Request, Sizes, request_for
from jaxbake.plan.search import make_plan

__all__ = ["Case", "Figures", "Memory", "Plan", "Request", "Sizes", "make_plan", "request_for"]
