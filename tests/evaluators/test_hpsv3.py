"""HPSv3: prompt, image and positions equal the package's; unsuitable files are refused in one line."""

import hashlib
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from alignbench.config import UserError
from alignbench.evaluator import to_tensor
from alignbench.evaluators import hpsv3
from alignbench.evaluators.hpsv3 import HPSv3
from alignbench.prompts import Prompt
from alignbench.rehearsal import tiny_qwen
from alignbench.testing import EvaluatorContract
from alignbench.testing.evaluator_contract import random_image

pytestmark = pytest.mark.slow  # one multimodal language model, many times

SIZES = [(512, 512), (364, 531), (301, 224), (60, 400), (17, 23)]  # (height, width)
TEXTS = ["a red circle", "{braces} & \\n café 🎨", "", "x " * 200, "a red circle"]
PROMPTS = [Prompt(f"p{i}", text) for i, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_qwen.hpsv3_folder(tmp_path_factory.mktemp("hpsv3"))


@pytest.fixture(scope="module")
def port(folder):
    return HPSv3(weights=str(folder), base=str(folder))


@pytest.fixture(scope="module")
def images():
    return [random_image(*size, seed=i) for i, size in enumerate(SIZES)]


class TestHPSv3(EvaluatorContract):
    @pytest.fixture(autouse=True)
    def _evaluator(self, port):
        self.evaluator = port


# -- the model's inputs -----------------------------------------------------------------------------------------------


def test_the_rubric_is_the_packages():
    """The rubric has the bytes of hpsv3 1.0.0's INSTRUCTION and prompt_with_special_token."""
    digest = hashlib.sha256(hpsv3.RUBRIC.read_bytes()).hexdigest()
    assert digest == "f6ee57479d4e9eee76b49c00dc962e1e696a5a2b3cc32cebd9b1fa76fe27502c"


def test_the_chat_follows_qwens_template(port):
    """It has a system line, one image and the rubric with the prompt, whatever the prompt contains."""
    for text in TEXTS:
        rubric = hpsv3.RUBRIC.read_text().replace("{text_prompt}", text)
        content = [{"type": "image"}, {"type": "text", "text": rubric}]
        asked = [{"role": "user", "content": content}]
        assert hpsv3.chat(text) == port._tokenizer.apply_chat_template(
            asked, tokenize=False, add_generation_prompt=True
        )


def test_tokenising_in_two_parts_equals_tokenising_the_whole(port):
    """The parts before and after the image token, joined by it, have the tokens of the whole chat."""
    for text in TEXTS:
        whole = port._tokenizer(hpsv3.chat(text))["input_ids"]
        assert port._tokens(text, [1, 2, 2]).tolist() == whole
        assert whole.count(port._reward_id) == 1


def test_sizes_are_qwens():
    """For 2000 random sizes, smart_size is transformers' smart_resize at 256 tokens' worth of pixels."""
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    rng = random.Random(0)
    for _ in range(2000):
        height = rng.randint(1, 2000)
        width = rng.randint(max(1, height // 50), min(2000, height * 50))
        limits = {"min_pixels": hpsv3.PIXELS, "max_pixels": hpsv3.PIXELS}
        assert hpsv3.smart_size(height, width) == smart_resize(height, width, factor=28, **limits)
    assert hpsv3.smart_size(1024, 1024) == hpsv3.smart_size(720, 720) == (448, 448)
    assert hpsv3.smart_size(512, 768) == (364, 532)


def test_patches_are_qwens(images):
    """Pillow's resize, rescaling, normalising and cutting equal transformers' processor to 1e-6."""
    from transformers import Qwen2VLImageProcessor

    for image in images:
        resized = hpsv3._resized(image)
        theirs = Qwen2VLImageProcessor()(images=[resized], do_resize=False, return_tensors="pt")
        ours = hpsv3.patches(to_tensor(resized))
        torch.testing.assert_close(ours, theirs["pixel_values"], rtol=0, atol=1e-6)
        grid = [1, resized.height // 14, resized.width // 14]
        assert theirs["image_grid_thw"].tolist() == [grid]


# -- the model's outputs ----------------------------------------------------------------------------------------------


def as_a_language_model(port, image, text):
    """Score with a plain Qwen2, without axes: its input is the chat with the image features inserted by hand."""
    from transformers import Qwen2Config, Qwen2Model

    vision = port._model["model"].visual
    known = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    settings = {key: getattr(port._model["model"].config.text_config, key) for key in (*known, "num_key_value_heads")}
    language = Qwen2Model(Qwen2Config(**settings, rope_parameters={"rope_type": "default", "rope_theta": 1e6}))
    language.load_state_dict(port._model["model"].language_model.state_dict())
    language.rotary_emb.inv_freq = language.rotary_emb.inv_freq.bfloat16().float()
    resized = to_tensor(hpsv3._resized(image))
    grid = [1, resized.shape[1] // 14, resized.shape[2] // 14]
    ids = port._tokens(text, grid)
    embedded = language.embed_tokens(ids)
    seen = vision(hpsv3.patches(resized), grid_thw=torch.tensor([grid])).pooler_output
    embedded[ids == port._image_id] = seen
    states = language.eval()(inputs_embeds=embedded[None]).last_hidden_state[0]
    return port._model["rm_head"](states[ids == port._reward_id])[0, 0]


@torch.no_grad()
def test_positions_are_plain_and_frequencies_rounded(port, images):
    """With positions 0, 1, 2, ... everywhere, Qwen2-VL is a plain Qwen2: the two agree to 1e-5."""
    theirs = [as_a_language_model(port, image, text).item() for image, text in zip(images, TEXTS)]
    ours = port.score(images, PROMPTS)["hpsv3"].to_numpy()
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    assert np.ptp(theirs) > 0.1


def test_every_frequency_is_a_bfloat16(port):
    """Frequencies of the language model and the vision tower are, even if everything else is float32."""
    buffers = {name: x for name, x in port._model.named_buffers() if name.endswith("inv_freq")}
    assert len(buffers) >= 2
    assert all(torch.equal(x, x.bfloat16().to(x.dtype)) for x in buffers.values())


def test_a_batch_of_all_shapes_equals_single_images(port, images):
    """Padding on the right and images of other grids change nothing."""
    together = port.score(images, PROMPTS)["hpsv3"].to_numpy()
    alone = [port.score([image], [prompt])["hpsv3"][0] for image, prompt in zip(images, PROMPTS)]
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-5)


def test_half_precision_is_near(port, folder, images):
    """In bfloat16 scores change only by rounding, and the head stays in float32."""
    half = HPSv3(weights=str(folder), base=str(folder), dtype="bfloat16")
    gap = half.score(images, PROMPTS)["hpsv3"] - port.score(images, PROMPTS)["hpsv3"]
    assert np.abs(gap).max() < 0.1
    assert {p.dtype for p in half._model["model"].parameters()} == {torch.bfloat16}
    assert {p.dtype for p in half._model["rm_head"].parameters()} == {torch.float32}


@torch.no_grad()
def test_the_tensor_path_is_near_pillows(port, images):
    """Resizing in floats, without rounding to 8 bits, changes scores by under 0.02; images differ by more than 0.1."""
    score = port.score(images, PROMPTS)["hpsv3"].to_numpy()
    reward = [port.reward(to_tensor(i)[None], [p]).item() for i, p in zip(images, PROMPTS)]
    assert np.abs(score - reward).max() < 0.02
    assert np.ptp(score) > 0.1


def test_the_reward_has_a_gradient_in_every_pixel(port):
    """The gradient is finite, and equals the central difference along its signs."""
    x = to_tensor(random_image(40, 56, 0))[None].mul(0.8).add(0.1).requires_grad_()
    (gradient,) = torch.autograd.grad(port.reward(x, PROMPTS[:1]).sum(), x)
    assert gradient.isfinite().all()
    assert (gradient != 0).float().mean() > 0.99
    direction = gradient.sign()
    with torch.no_grad():
        up, down = (port.reward(x + step * direction, PROMPTS[:1]).double() for step in (3e-4, -3e-4))
    slope = (gradient * direction).double().sum()
    assert abs((up - down) / 6e-4 - slope) < 0.02 * slope


# -- what is refused --------------------------------------------------------------------------------------------------


def refused(says, act):
    with pytest.raises(UserError, match=says) as error:
        act()
    assert "\n" not in str(error.value)


def test_missing_files_say_what_to_do(folder, tmp_path):
    """A missing checkpoint, base or unfetched id is one line, with the command that fetches it."""
    base = str(folder)
    refused(r"HPSv3\.safetensors is missing", lambda: HPSv3(weights=str(tmp_path), base=base).files())
    refused(r"hf download a/b HPSv3\.safetensors", lambda: HPSv3(weights="a/b", base=base).files())
    refused(r"config\.json is missing", lambda: HPSv3(weights=base, base=str(tmp_path)).files())
    refused("hf download a/b config.json tokenizer.json", lambda: HPSv3(weights=base, base="a/b").files())


def test_a_truncated_checkpoint_is_one_clear_line(folder, tmp_path):
    """Its header reveals it before anything is loaded."""
    whole = (folder / hpsv3.CHECKPOINT).read_bytes()
    (tmp_path / hpsv3.CHECKPOINT).write_bytes(whole[: len(whole) // 2])
    refused("cannot be read: truncated", lambda: HPSv3(weights=str(tmp_path), base=str(folder)).files())


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda state: state.pop("rm_head.5.bias"), "Missing key.*rm_head.5.bias"),
        (lambda state: state.update({"model.extra": torch.zeros(1)}), "Unexpected key.*model.language_model.extra"),
        (lambda state: state.update({"rm_head.0.weight": torch.zeros(1024, 3)}), "size mismatch"),
        (lambda state: state.pop("model.embed_tokens.weight"), "has embeddings for 0 tokens"),
    ],
)
def test_another_architecture_is_refused(folder, tmp_path, images, spoil, says):
    """Missing, unexpected or misshapen tensors are named; nothing stays random."""
    state = load_file(folder / hpsv3.CHECKPOINT)
    spoil(state)
    save_file(state, tmp_path / hpsv3.CHECKPOINT)
    wrong = HPSv3(weights=str(tmp_path / hpsv3.CHECKPOINT), base=str(folder))
    refused(says, lambda: wrong.score(images[:1], PROMPTS[:1]))


def test_another_tokenizer_is_refused(folder, tmp_path, images):
    """The special token must be the last embedding: another vocabulary would shift every id."""
    base = tiny_qwen.qwen2vl_base(tmp_path)
    text = (base / "tokenizer.json").read_text().replace("<|video_pad|>", "<|im_start|>")
    (base / "tokenizer.json").write_text(text)
    (base / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    wrong = HPSv3(weights=str(folder), base=str(base))
    refused(
        "has embeddings for 265 tokens, but the tokenizer of hpsv3.base has",
        lambda: wrong.score(images[:1], PROMPTS[:1]),
    )


def test_unsuitable_inputs_are_refused(port, folder, images):
    """A prompt with the rubric's tokens, an image too narrow to resize and pixels on another scale are refused."""
    for token in ("<|Reward|>", "<|image_pad|>"):
        refused("holds <", lambda token=token: port.check([Prompt("p", f"a {token}")]))
    with pytest.raises(ValueError, match="an image of 500 x 2 is too narrow"):
        port.score([random_image(2, 500, 0)], PROMPTS[:1])
    for wrong in (lambda x: x * 255, lambda x: x * 2 - 1):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
            port.reward(wrong(to_tensor(images[0])[None]), PROMPTS[:1])


def test_the_official_engine_gives_no_reward(folder):
    """It says so before training, and ``reward`` raises an error."""
    evaluator = HPSv3(weights=str(folder), base=str(folder), engine="official")
    assert not evaluator.differentiable
    refused("gives no training reward", lambda: evaluator.reward(torch.zeros(1, 3, 8, 8), PROMPTS[:1]))


def test_files_need_no_torch(port):
    """Naming HPSv3 and checking its files imports neither torch nor transformers."""
    code = f"""import sys
from alignbench.evaluators.hpsv3 import HPSv3
assert HPSv3(weights={port.weights!r}, base={port.base!r}).files()
assert not {{"torch", "transformers", "torchvision"}} & set(sys.modules)"""
    subprocess.run([sys.executable, "-c", code], check=True)
