__version__ = "0.1.0"

# Public names are imported when first used, so that `import e2e_sae_nb` is quick and `e2e-sae --help` answers at once.
import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from e2e_sae_nb.core import UserError
    from e2e_sae_nb.demonstration import demo
    from e2e_sae_nb.evaluation import EvalResult
    from e2e_sae_nb.frontiers import frontier
    from e2e_sae_nb.losses import LossConfig, e2e_ds_loss, e2e_loss, local_loss
    from e2e_sae_nb.members import FrontierConfig
    from e2e_sae_nb.models import Subject, load_subject, open_bridge
    from e2e_sae_nb.runs import Run, RunConfig, load_run
    from e2e_sae_nb.sae import SAE, SAEConfig
    from e2e_sae_nb.splicing import splice
    from e2e_sae_nb.training import evaluate, train

_WHERE = {
    "core": ["UserError"], "demonstration": ["demo"], "evaluation": ["EvalResult"], "frontiers": ["frontier"], "members": ["FrontierConfig"],
    "losses": ["LossConfig", "e2e_ds_loss", "e2e_loss", "local_loss"], "models": ["Subject", "load_subject", "open_bridge"],
    "runs": ["Run", "RunConfig", "load_run"], "sae": ["SAE", "SAEConfig"], "splicing": ["splice"], "training": ["evaluate", "train"],
}
__all__ = [
    "EvalResult", "FrontierConfig", "LossConfig", "Run", "RunConfig", "SAE", "SAEConfig", "Subject", "UserError", "demo", "e2e_ds_loss",
    "e2e_loss", "evaluate", "frontier", "load_run", "load_subject", "local_loss", "open_bridge", "splice", "train",
]


def __getattr__(name: str):
    for module, names in _WHERE.items():
        if name in names:
            value = getattr(importlib.import_module(f"e2e_sae_nb.{module}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'e2e_sae_nb' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])
