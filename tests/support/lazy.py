"""Names of heavy modules, imported at their first use, so that collecting tests loads none.

    from tests.support.lazy import AutoProcessor

gives a stand-in that imports transformers when it is called, read or used in `isinstance`. The
names are those of the block that only type checkers execute: add a line there for a new one.
A base class, a decorator or an argument of `pytest.raises` needs the real object.
"""

# ruff: noqa: F401
# pyright: reportUnusedImport=false

import ast
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import ray
    import s3fs
    from botocore import session as botocore_session
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from ray.cluster_utils import Cluster
    from scipy.optimize import linear_sum_assignment
    from sklearn.datasets import load_digits
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    from transformers import (
        AttentionInterface,
        AttentionMaskInterface,
        AutoConfig,
        AutoModelForImageTextToText,
        AutoProcessor,
        CLIPImageProcessor,
        CLIPVisionConfig,
        DynamicCache,
        GPT2Config,
        GPT2LMHeadModel,
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        Idefics3ImageProcessor,
        Idefics3Processor,
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextImageProcessor,
        LlavaNextModel,
        LlavaNextProcessor,
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        LlavaProcessor,
        MistralConfig,
        PreTrainedModel,
        PreTrainedTokenizerFast,
        ProcessorMixin,
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2Config,
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen3Config,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        SiglipImageProcessor,
        SiglipVisionConfig,
        SmolVLMConfig,
        SmolVLMForConditionalGeneration,
        StaticCache,
    )
    from transformers.masking_utils import flash_attention_mask
    from transformers.models.llama.modeling_llama import LlamaAttention
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
    from transformers.models.llava_next.modeling_llava_next import (
        LlavaNextMultiModalProjector,
        get_anyres_image_grid_shape,
        image_size_to_num_patches,
        unpad_image,
    )

    from jobs.cluster import actor_pool
    from jobs.cluster.actor_pool import ActorPool, ray_session, worker_resources
    from jobs.cluster.planning import plan_cache
    from jobs.cluster.submit import entrypoint, run_flags, submit
    from jobs.demo import emkd as emkd_demo
    from jobs.demo import epic as epic_demo
    from jobs.stages.build import run_build, run_extend
    from jobs.stages.evaluate import run_evaluate
    from jobs.stages.train import run_train
    from pipeline.demo import digits
    from pipeline.demo import model as demo_model
    from pipeline.demo import teacher as demo_teacher
    from pipeline.demo.digits import load_grids, patch_labels, write_digits
    from pipeline.demo.model import build_processor, build_tokenizer
    from pipeline.demo.teacher import TeacherSettings, train_demo_teacher
    from pipeline.inspection.picture import draw_sample, token_values
    from pipeline.report import figures
    from pipeline.report.figures import Budget, draw_budgets
    from pipeline.report.report import write_report
    from pipeline.report.token_budgets import budgets_of
    from pipeline.student.evaluate import evaluate
    from pipeline.student.train import student_identity, train
    from student_train.losses import reference
    from student_train.losses.reference import ModelOutputs
    from student_train.models.avgpool_llava_next import (
        AvgPoolLlavaNextConfig,
        AvgPoolLlavaNextModel,
    )
    from student_train.models.forward import output_head
    from student_train.models.projectors import (
        AvgPoolLlavaNextProjector,
        AvgPoolLlavaProjector,
        average_pool,
        pooled_side,
    )
    from student_train.models.student import load_student, student_from_vanilla, vanilla_student
    from student_train.ops import l1_triton
    from student_train.training.fsdp import (
        average_gradients,
        gathered_head,
        gradient_norm,
        load_weights,
        scatter_head,
        shard,
        whole_weights,
    )
    from student_train.training.run import train_student
    from student_train.training.student_loss import student_loss
    from tests.support.tiny_processors import (
        publish,
        token_id,
        tokenizer,
    )


class LazyName:
    """Stands for one object of a module; every use of it goes to the object."""

    # What pytest asks of every global of a test file: no test, no fixture, no TestCase.
    __test__ = False
    _mock_name = "lazy"
    __bases__ = ()

    def __init__(self, module: str, name: str | None) -> None:
        vars(self).update(_module=module, _name=name)

    def _found(self) -> Any:
        module = import_module(self._module)
        if self._name is None:
            return module
        if not hasattr(module, self._name):
            return import_module(f"{self._module}.{self._name}")
        return getattr(module, self._name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._found()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._found(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f'patch by name: monkeypatch.setattr("{self._module}.{name}", ...)')

    def __instancecheck__(self, instance: object) -> bool:
        return isinstance(instance, self._found())


def _names() -> dict[str, LazyName]:
    """The stand-ins for what the block of `TYPE_CHECKING` imports."""
    tree = ast.parse(Path(__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    found: dict[str, LazyName] = {}
    for node in block.body:
        if isinstance(node, ast.ImportFrom):
            found |= {a.asname or a.name: LazyName(str(node.module), a.name) for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.asname or a.name: LazyName(a.name, None) for a in node.names}
    return found


globals().update(_names())
