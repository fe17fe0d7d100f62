"""InterleaveInferencer: conversations of texts and pictures in, a text or a picture (or both) out.

Three contexts are kept: `main`; `cfg_text`, all but the last text; `cfg_img`, the texts without the pictures.
"""

import sys
from pathlib import Path

if not __package__:  # `from inferencer import InterleaveInferencer` with this folder on the path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from bagel.data.sources import ImageFault, ImageTransform, check_sides
from bagel.data.tokenizer import SpecialTokens
from bagel.model import Bagel
from bagel.modules.vision import Autoencoder, to_uint8
from bagel.packing import unpatchify
from bagel.sampling.context import Context
from bagel.sampling.generation import (
    Drawing,
    Guidance,
    Renorm,
    Wrapper,
    bare,
    clean_latents,
    continue_text,
    draw,
    extend,
    latent_block,
    text_block,
    vit_block,
)
from shared.errors import UserError
from shared.media.pictures import as_rgb
from shared.rng import keyed_generator

# The two prompts that the released weights were tuned with.
THINK_TO_ANSWER = (
    "You should first think about the reasoning process in the mind and then provide the user with the answer. \n"
    "The reasoning process is enclosed within <think> </think> tags, "
    "i.e. <think> reasoning process here </think> answer here"
)
THINK_TO_DRAW = (
    "You should first think about the planning process in the mind and then generate the image. \n"
    "The planning process is enclosed within <think> </think> tags, "
    "i.e. <think> planning process here </think> image here"
)

BATCH = 16  # conversations that are computed together
_NOISE, _TEXT, _POSTERIOR = 311, 312, 313  # random streams
Input = str | Image.Image
Task = Literal["auto", "t2i", "edit", "understand", "text"]


@dataclass
class Contexts:
    """The three contexts of one conversation, and the size of the picture it would draw."""

    main: Context
    cfg_text: Context
    cfg_img: Context
    image_shape: tuple[int, int]  # (height, width), pixels


class InterleaveInferencer:
    """model: a Bagel (or its wrapper in training); transforms: of VAE and ViT pictures; new_token_ids: the four marks
    by name.

    seed keys every draw: two inferencers of one seed give the same results in the same order of calls, and every call
    of gen_image, gen_text, interleave_inference draws anew. sample_posterior: draw the latents of a condition picture
    from the posterior, as the released code does, rather than take its mean. edit_vit_transform: how the vision tower
    sees a picture that is also given as latents, in an edit; None: as any other.
    """

    def __init__(
        self,
        model: Bagel | Wrapper,
        vae_model: Autoencoder,
        tokenizer: Any,
        vae_transform: ImageTransform,
        vit_transform: ImageTransform,
        new_token_ids: dict[str, int] | SpecialTokens,
        *,
        edit_vit_transform: ImageTransform | None = None,
        seed: int = 0,
        sample_posterior: bool = True,
    ):
        self.model, self.vae_model, self.tokenizer = model, vae_model, tokenizer
        self.vae_transform, self.vit_transform = vae_transform, vit_transform
        self.edit_vit_transform = edit_vit_transform or vit_transform
        self._calls = 0  # pictures and sampled texts so far: each has draws of its own
        self.tokens = (
            new_token_ids if isinstance(new_token_ids, SpecialTokens) else SpecialTokens.from_names(new_token_ids)
        )
        self.config = bare(model).config
        self.seed, self.sample_posterior = seed, sample_posterior

    # --- contexts ---

    def init_gen_context(self) -> Context:
        """An empty context."""
        return Context()

    @torch.no_grad()
    def update_context_text(self, text: str, context: Context) -> Context:
        """The context with one more text segment."""
        context = context.copy()
        extend(self.model, [context], [text_block(self.tokenizer.encode(text), self.tokens)], store=True)
        return context

    @torch.no_grad()
    def update_context_image(self, image: Image.Image, context: Context, vae: bool = True, vit: bool = True) -> Context:
        """The context with a picture: as latents, then as ViT tokens."""
        if not (vae or vit):
            raise UserError("a picture must be given as latents (vae), as ViT tokens (vit) or both")
        context, stride = context.copy(), self.config.latent_stride
        look = self.edit_vit_transform if vae else self.vit_transform
        self._check(image, self.vae_transform, self.config.max_latent_size, vae)
        self._check(image, look, self.config.vision.patches_per_side, vit)
        if vae:
            pixels, patch = self.vae_transform(image), self.config.latent_patch_size
            rows, columns = pixels.shape[1] // stride, pixels.shape[2] // stride
            noise = None
            if self.sample_posterior:
                shape = (1, self.config.autoencoder.z_channels, rows * patch, columns * patch)
                noise = torch.randn(shape, generator=keyed_generator(self.seed, _POSTERIOR, context.kv_len))
            latents = clean_latents(self.vae_model, pixels, patch, noise=noise)
            extend(
                self.model, [context], [latent_block(self.model, latents, rows, columns, 0.0, self.tokens)], store=True
            )
        if vit:
            extend(self.model, [context], [vit_block(self.model, look(image), self.tokens)], store=True)
        return context

    @staticmethod
    def _check(image: Image.Image, transform: ImageTransform, most: int, used: bool) -> None:
        """Refuse what training refuses: shapes that the resize rule would bend, sides beyond the position table."""
        try:
            if used:
                check_sides("the picture", image.size, transform.sides(*image.size), transform.stride, most)
        except ImageFault as fault:
            raise UserError(str(fault)) from None

    # --- one context out ---

    def gen_text(
        self, context: Context, max_length: int = 500, do_sample: bool = True, temperature: float = 1.0
    ) -> str:
        """The text that follows; the context stays as it is."""
        return self.gen_texts([context], max_length, do_sample, temperature)[0]

    def gen_texts(
        self, contexts: Sequence[Context], max_length: int = 500, do_sample: bool = True, temperature: float = 1.0
    ) -> list[str]:
        """The texts that follow several contexts, in one batch; each stops at its own end. temperature 0: the likeliest
        token.
        """
        key = (self.seed, _TEXT, self._calls) if self._calls else (self.seed, _TEXT)
        self._calls += do_sample
        found = continue_text(
            self.model,
            contexts,
            self.tokens,
            max_length=max_length,
            do_sample=do_sample,
            temperature=temperature,
            generator=keyed_generator(*key),
        )
        return [self.tokenizer.decode(ids[1:]) for ids in found]

    def gen_image(
        self,
        image_shape: tuple[int, int],
        context: Context,
        cfg_text_scale: float = 4.0,
        cfg_img_scale: float = 1.5,
        cfg_text_precontext: Context | None = None,
        cfg_img_precontext: Context | None = None,
        cfg_interval: Sequence[float] = (0.4, 1.0),
        cfg_renorm_min: float = 0.0,
        cfg_renorm_type: Renorm = "global",
        num_timesteps: int = 50,
        timestep_shift: float = 3.0,
    ) -> Image.Image:
        """One picture of (height, width) pixels. Contexts of guidance that are not given are empty (text) and `context`
        (pictures).
        """
        height, width = image_shape
        contexts = Contexts(context, cfg_text_precontext or Context(), cfg_img_precontext or context, (height, width))
        guidance = Guidance(
            cfg_text_scale,
            cfg_img_scale,
            tuple(cfg_interval),
            cfg_renorm_min,
            cfg_renorm_type,
            num_timesteps,
            timestep_shift,
        )
        self._calls += 1
        return self.gen_images([contexts], guidance, first=self._calls - 1)[0]

    def gen_images(self, batch: Sequence[Contexts], guidance: Guidance, *, first: int = 0) -> list[Image.Image]:
        """Pictures of several conversations, in one batch. The noise of picture i is keyed by (seed, first + i)."""
        drawings = []
        for number, contexts in enumerate(batch, start=first):
            rows, columns = self._grid(contexts.image_shape)
            noise = torch.randn(
                rows * columns, self.config.latent_width, generator=keyed_generator(self.seed, _NOISE, number)
            )
            drawings.append(Drawing(contexts.main, contexts.cfg_text, contexts.cfg_img, noise, rows, columns))
        latents = draw(self.model, drawings, guidance, self.tokens)
        return [
            self.decode_image(latent, contexts.image_shape) for latent, contexts in zip(latents, batch, strict=True)
        ]

    def _grid(self, shape: tuple[int, int]) -> tuple[int, int]:
        stride, most = self.config.latent_stride, self.config.max_latent_size
        if any(side < stride or side % stride or side // stride > most for side in shape):
            raise UserError(
                f"a picture of {shape[0]} x {shape[1]} pixels (height x width) cannot be drawn: both sides must be "
                f"multiples of {stride} and at most {stride * most}"
            )
        return shape[0] // stride, shape[1] // stride

    @torch.no_grad()
    def decode_image(self, latent: Tensor, image_shape: tuple[int, int]) -> Image.Image:
        """Latent tokens (N, C) as a picture of (height, width) pixels."""
        rows, columns = self._grid(image_shape)
        cells = unpatchify(latent, rows, columns, self.config.latent_patch_size)
        device = next((value.device for value in self.vae_model.parameters()), cells.device)
        return Image.fromarray(to_uint8(self.vae_model.decode(cells[None].to(device))[0]).cpu().numpy())

    # --- whole conversations ---

    def read(
        self,
        inputs: Sequence[Input],
        *,
        think: bool = False,
        understanding_output: bool = False,
        image_shapes: tuple[int, int] = (1024, 1024),
    ) -> Contexts:
        """The three contexts after all inputs. A picture sets the size of the picture to draw."""
        height, width = image_shapes
        found = Contexts(Context(), Context(), Context(), (height, width))
        if think:
            prompt = THINK_TO_ANSWER if understanding_output else THINK_TO_DRAW
            found.main = self.update_context_text(prompt, found.main)
            found.cfg_img = self.update_context_text(prompt, found.cfg_img)
        for item in inputs:
            if isinstance(item, str):
                found.cfg_text = found.main.copy()
                found.main = self.update_context_text(item, found.main)
                found.cfg_img = self.update_context_text(item, found.cfg_img)
            elif isinstance(item, Image.Image):
                picture = as_rgb(item)
                self._check(picture, self.vae_transform, self.config.max_latent_size, True)
                image = self.vae_transform.resize_transform(picture)  # the ViT sees the resized picture too
                found.main = self.update_context_image(image, found.main, vae=not understanding_output)
                found.image_shape = (image.height, image.width)
                found.cfg_text = found.main.copy()
            else:
                raise UserError(f"an input must be a text or a picture, found {type(item).__name__}")
        if all(isinstance(item, str) for item in inputs):
            found.cfg_img = found.main  # the same texts: one branch of guidance less to compute
        return found

    def interleave_inference(
        self,
        input_lists: Sequence[Input],
        think: bool = False,
        understanding_output: bool = False,
        max_think_token_n: int = 1000,
        do_sample: bool = False,
        text_temperature: float = 0.3,
        cfg_text_scale: float = 3.0,
        cfg_img_scale: float = 1.5,
        cfg_interval: Sequence[float] = (0.4, 1.0),
        timestep_shift: float = 3.0,
        num_timesteps: int = 50,
        cfg_renorm_min: float = 0.0,
        cfg_renorm_type: Renorm = "global",
        image_shapes: tuple[int, int] = (1024, 1024),
    ) -> list[Input]:
        """[text] when only understanding, else [picture], with the thought before it when thinking."""
        found = self.read(
            input_lists, think=think, understanding_output=understanding_output, image_shapes=image_shapes
        )
        outputs: list[Input] = []
        if understanding_output or think:
            thought = self.gen_text(found.main, max_think_token_n, do_sample, text_temperature)
            outputs.append(thought)
        if not understanding_output:
            if think:
                found.main = self.update_context_text(thought, found.main)
            outputs.append(
                self.gen_image(
                    found.image_shape,
                    found.main,
                    cfg_text_scale,
                    cfg_img_scale,
                    found.cfg_text,
                    found.cfg_img,
                    cfg_interval,
                    cfg_renorm_min,
                    cfg_renorm_type,
                    num_timesteps,
                    timestep_shift,
                )
            )
        return outputs

    def __call__(self, image: Image.Image | None = None, text: str | None = None, **settings: Any) -> dict[str, Any]:
        """{"image", "text"} of a picture and a text, the picture first; settings as of interleave_inference."""
        result: dict[str, Any] = {"image": None, "text": None}
        inputs = [item for item in (image, text) if item is not None]
        if not inputs:
            warnings.warn("neither a picture nor a text was given: nothing to do", stacklevel=2)
            return result
        for output in self.interleave_inference(inputs, **settings):
            result["text" if isinstance(output, str) else "image"] = output
        return result

    def unified_generate(
        self,
        prompt: str,
        images: Sequence[Image.Image] | Image.Image | None = None,
        task: Task = "auto",
        output: Literal["auto", "image", "text"] = "auto",
        seed: int | None = None,
        **settings: Any,
    ) -> dict[str, Any]:
        """{"text", "image", "task", "seed"} for one prompt.

        task auto: without pictures t2i (text when output is "text"); with pictures understand, and edit only when
        output is "image". seed: this call alone is keyed by it, whatever came before.
        """
        images = [images] if isinstance(images, Image.Image) else list(images or ())
        task = _task(task, bool(images), output)
        defaults: dict[str, Any] = {"understanding_output": True, "max_think_token_n": 512}
        if task == "edit":
            defaults = dict(
                cfg_text_scale=4.0, cfg_img_scale=2.0, cfg_interval=(0.0, 1.0), cfg_renorm_type="text_channel"
            )
        elif task == "t2i":
            defaults = dict(cfg_text_scale=4.0, cfg_img_scale=1.5)
        former = self.seed, self._calls
        if seed is not None:
            if seed < 0:
                raise UserError(f"seed {seed} is below 0")
            self.seed, self._calls = seed, 0
        try:
            outputs = self.interleave_inference([*images, prompt], **{**defaults, **settings})
            result: dict[str, Any] = {"text": None, "image": None, "task": task, "seed": self.seed}
        finally:
            if seed is not None:
                self.seed, self._calls = former
        for item in outputs:
            result["text" if isinstance(item, str) else "image"] = item
        return result

    def generate_batch(
        self,
        prompts: Sequence[Sequence[Input]],
        *,
        understanding_output: bool = False,
        max_length: int = 512,
        do_sample: bool = False,
        temperature: float = 0.3,
        guidance: Guidance | None = None,
        image_shapes: tuple[int, int] = (1024, 1024),
    ) -> list[Input]:
        """One output for each conversation; texts are continued and pictures drawn together."""
        if understanding_output:
            return [*self.answer_batch(prompts, max_length, do_sample, temperature)]
        return [*self.draw_batch(prompts, guidance or Guidance(), image_shapes)]

    def answer_batch(
        self,
        prompts: Sequence[Sequence[Input]],
        max_length: int = 512,
        do_sample: bool = False,
        temperature: float = 0.3,
    ) -> list[str]:
        """A text for each conversation; BATCH of them are in memory at once."""
        answers: list[str] = []
        for first in range(0, len(prompts), BATCH):
            found = [self.read(inputs, understanding_output=True).main for inputs in prompts[first : first + BATCH]]
            answers += self.gen_texts(found, max_length, do_sample, temperature)
        return answers

    def draw_batch(
        self, prompts: Sequence[Sequence[Input]], guidance: Guidance, image_shapes: tuple[int, int]
    ) -> list[Image.Image]:
        """A picture for each conversation, the noise of picture i keyed by (seed, i); BATCH are in memory at once."""
        pictures: list[Image.Image] = []
        for first in range(0, len(prompts), BATCH):
            found = [self.read(inputs, image_shapes=image_shapes) for inputs in prompts[first : first + BATCH]]
            pictures += self.gen_images(found, guidance, first=first)
        return pictures


def _task(task: Task, has_images: bool, output: str) -> Task:
    if task not in ("auto", "t2i", "edit", "understand", "text"):
        raise UserError(f"task {task!r}: expected auto, t2i, edit, understand or text")
    if task == "auto":
        if has_images:
            return "edit" if output == "image" else "understand"
        return "text" if output == "text" else "t2i"
    if task in ("edit", "understand") and not has_images:
        raise UserError(f"task {task} needs a picture; give --image, or use t2i or text")
    if task in ("t2i", "text") and has_images:
        raise UserError(f"task {task} takes no picture; use edit or understand")
    return task
