"""The inferencer of HPSv3, in the environment hpsv3-official: ``python -I hpsv3.py request.json``.

The request also has ``base`` (a folder with Qwen2-VL's configuration, tokenizer and preprocessing), ``dtype``
("bfloat16", the package's default, or "float32": the same model, upcast after loading), ``batch`` (images per forward
pass) and ``differentiable`` (use the package's tensor path). The package's scoring code runs unmodified, but packages
that only its training loop imports are replaced by empty modules; the base model's weights are not read, since the
checkpoint replaces all of them; and the head's input is float32 on CPUs, too, as the package makes it on CUDA.
"""

import json
import sys
import tempfile
import types
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers.trainer  # it looks for packages, so import it before the empty modules below
import yaml
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor


def absent(name: str, **names: Any) -> None:
    """Put an empty module ``name`` in place, with only ``names`` in it."""
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(names)


for module in ("matplotlib", "matplotlib.pyplot", "matplotlib.patches", "fire", "datasets"):
    absent(module)
absent("torch.utils.tensorboard", SummaryWriter=None)
absent("peft", PeftModel=None, LoraConfig=None, get_peft_model=None)
absent("trl", RewardTrainer=object, get_kbit_device_map=lambda: None, get_quantization_config=lambda config: None)
import hpsv3.inference as package  # noqa: E402 - after the lines above
from hpsv3.train import Qwen2VLRewardModelBT  # noqa: E402


def from_config(path: str, torch_dtype: torch.dtype, attn_implementation: str, **settings: Any) -> Any:
    """Return the package's model with random weights."""
    for unused in ("cache_dir", "revision", "device_map", "quantization_config", "use_cache"):
        settings.pop(unused)
    config = transformers.AutoConfig.from_pretrained(path)
    config.use_cache = False
    chosen = {"torch_dtype": torch_dtype, "attn_implementation": attn_implementation}
    return Qwen2VLRewardModelBT._from_config(config, **chosen, **settings)


def load(request: dict, device: str) -> Any:
    """Return the package's inferencer, with its own configuration except for the base model's folder and the device."""
    Qwen2VLRewardModelBT.from_pretrained = from_config
    changes = {"model_name_or_path": request["base"]}
    if device == "cpu":
        changes |= {"use_cpu": True, "disable_flash_attn2": True}
    packaged = Path(package._MODEL_CONFIG_PATH) / "HPSv3_7B.yaml"
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "HPSv3_7B.yaml"
        config.write_text(yaml.safe_dump({**yaml.safe_load(packaged.read_text()), "output_dir": folder, **changes}))
        settings = {"device": device, "differentiable": request["differentiable"]}
        inferencer = package.HPSv3RewardInferencer(str(config), request["checkpoint"], **settings)
    inferencer.model.to(getattr(torch, request["dtype"])).rm_head.to(torch.float32)
    inferencer.model.rm_head.register_forward_pre_hook(lambda head, hidden: (hidden[0].float(),))
    return inferencer


def read(path: str, differentiable: bool) -> Any:
    """Return an image as the inferencer takes it: its path, or (3, H, W) in 0 to 255 for the tensor path."""
    return pil_to_tensor(Image.open(path).convert("RGB")).float() if differentiable else path


def main(request: dict) -> None:
    """Score the request's images and write the answer."""
    inferencer = load(request, "cuda" if torch.cuda.is_available() else "cpu")
    images = [read(path, request["differentiable"]) for path in request["images"]]
    prompts, size = request["prompts"], request["batch"]
    scores: list[float] = []
    for start in range(0, len(images), size):
        part = slice(start, start + size)
        with torch.no_grad():
            scores += inferencer.reward(image_paths=images[part], prompts=prompts[part])[:, 0].tolist()
    versions = {name: version(name) for name in ("hpsv3", "transformers", "torch", "torchvision", "pillow")}
    Path(request["output"]).write_text(json.dumps({"scores": scores, "versions": versions}))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
