"""CLIP score of pictures and captions, by a CLIP model that should not be the one that conditioned the drawing."""

import numpy as np
import torch

from shared.errors import UserError


@torch.no_grad()
def clip_score(
    pictures: np.ndarray, captions: list[str], model_path: str, *, device: torch.device, batch_size: int = 32
) -> dict:
    """Mean of max(100 cos, 0) over pairs (Hessel et al. 2021), and the share of pictures whose own caption fits best
    of at most 100.

    Scores of different CLIP models do not compare; the model's name is part of the answer.
    """
    from transformers import CLIPModel, CLIPProcessor

    try:
        model = CLIPModel.from_pretrained(model_path).to(device).eval()
        processor = CLIPProcessor.from_pretrained(model_path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--clip-path {model_path}: cannot be loaded ({str(error).strip().splitlines()[0][:160]})"
        ) from None
    image_rows, text_rows = [], []
    for first in range(0, len(pictures), batch_size):
        part = slice(first, first + batch_size)
        inputs = processor(
            text=captions[part], images=list(pictures[part]), return_tensors="pt", padding=True, truncation=True
        ).to(device)
        output = model(**inputs)
        image_rows.append(output.image_embeds)
        text_rows.append(output.text_embeds)
    images, texts = (torch.nn.functional.normalize(torch.cat(rows), dim=1) for rows in (image_rows, text_rows))
    among = (images[:100] @ texts[:100].T).argmax(1).cpu()
    return {
        "score": (100 * (images * texts).sum(1)).clamp_min(0).mean().item(),
        "r_at_1": (among == torch.arange(len(among))).double().mean().item(),
        "among": len(among),
        "model": model_path,
    }
