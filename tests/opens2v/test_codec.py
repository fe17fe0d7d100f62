"""The small preset's codec: one latent frame for the first frame, one for every four later ones."""

import pytest
import torch

from opens2v.modules.codec import ConvCodec, Motion, codec_loss, softened
from opens2v.modules.encoders import PatchCodec
from shared.errors import UserError


def smooth_clips(count: int, frames: int) -> torch.Tensor:
    """(count, 3, frames, 16, 24) in [-1, 1]: a colour wave that moves."""
    draw = torch.Generator().manual_seed(1)
    phase = torch.rand(count, 3, 1, 1, 1, generator=draw) * 6
    rows, columns = torch.arange(16.0)[:, None], torch.arange(24.0)
    return 0.8 * torch.sin(0.25 * rows + 0.15 * columns + 0.2 * torch.arange(frames)[:, None, None] + phase)


def test_frames_of_a_clip_come_back_and_the_first_latent_frame_is_unit_scale():
    clips = smooth_clips(6, 9)
    codec = PatchCodec().fit(clips)
    latents = codec.encode(clips)
    assert latents.shape == (6, 16, 3, 4, 6)
    assert abs(latents[:, :, 0].square().mean().item() - 1) < 1e-4
    torch.testing.assert_close(latents[:, :, 0].square().mean((0, 2, 3)), codec.variance[0], atol=1e-3, rtol=1e-3)
    assert (codec.decode(latents) - clips).abs().max() < 0.02


def test_what_stands_still_is_zero_in_later_latent_frames():
    codec = PatchCodec().fit(smooth_clips(6, 5))
    still = smooth_clips(2, 1).expand(-1, -1, 5, -1, -1)
    latents = codec.encode(still)
    assert latents[:, :, 1].abs().max() == 0
    frames = codec.decode(latents)
    assert torch.equal(frames, frames[:, :, :1].expand_as(frames))


def test_a_picture_is_a_video_of_one_frame_and_other_lengths_are_refused():
    codec = PatchCodec().fit(smooth_clips(6, 5))
    picture = smooth_clips(2, 1)
    assert codec.encode(picture).shape == (2, 16, 1, 4, 6)
    assert codec.decode(codec.encode(picture)).shape == picture.shape
    with pytest.raises(UserError, match="4k \\+ 1 frames"):
        codec.encode(smooth_clips(2, 4))


def test_the_convolutional_codec_gives_latents_about_one_and_frames_of_any_number():
    torch.manual_seed(0)
    codec, clips = ConvCodec(width=8), torch.rand(6, 3, 9, 16, 24) * 2 - 1
    codec.measure(clips)
    latents = codec.encode(clips)
    assert latents.shape == (6, 16, 3, 4, 6) and codec.decode(latents).shape == clips.shape
    for part, used in ((latents[:, :, :1], 16), (latents[:, :, 1:], Motion.used)):
        assert torch.allclose(part.mean((0, 2, 3, 4)), torch.zeros(16), atol=1e-4)
        assert 0.3 < part[:, :used].std() < 1.2 and torch.equal(part[:, used:], torch.zeros_like(part[:, used:]))
    assert torch.equal(codec.encode(clips[:, :, :1]), latents[:, :, :1]), "a picture is a video of one frame"
    with pytest.raises(UserError, match="4k"):
        codec.encode(clips[:, :, :4])


def test_scales_lie_half_way_between_a_channel_s_own_and_the_common_one():
    found = softened(torch.tensor([4.0, 1.0, 0.0, 0.0]))
    common = (17 / 2) ** 0.5
    assert torch.allclose(found, torch.tensor([4 * common, common, 0, 0]).sqrt())


def test_an_untrained_codec_keeps_the_components_of_its_pictures():
    torch.manual_seed(0)
    codec, pictures = ConvCodec(), smooth_clips(6, 5)[:, :, 0]
    codec.first.start_from(pictures)
    with torch.no_grad():
        latents = codec.first.to_components(pictures)
        basis = codec.first.to_components.weight.flatten(1)
        patches = torch.nn.functional.pixel_unshuffle(pictures, 4).movedim(1, -1)
        mean = patches.unflatten(-1, (3, 16)).mean((0, 1, 2, 4)).repeat_interleave(16)
    assert (latents.movedim(1, -1) @ basis + mean - patches).abs().max() < 0.02


def test_equal_cells_are_decoded_without_seams():
    """A decoder that writes the pixels of a cell from channels of their own would repeat them in every cell."""
    torch.manual_seed(0)
    picture = ConvCodec().first.decode(torch.randn(1, 16, 1, 1).expand(1, 16, 4, 6))
    assert (picture - picture[:, :, :1, :1]).abs().max() < 1e-5


def test_a_new_motion_coder_lets_everything_stand_still():
    torch.manual_seed(0)
    motion, picture = Motion(16, 8), torch.rand(2, 3, 16, 24)
    frames = motion.decode(picture, torch.zeros(2, 16, 4, 6))
    assert frames.shape == (2, 3, 4, 16, 24)
    assert (frames[:, :, 0] - picture).abs().mean() < 0.15


def test_the_codec_learns_a_moving_square():
    torch.manual_seed(0)
    codec, clips = ConvCodec(width=8), torch.zeros(8, 3, 5, 16, 16) - 0.5
    for place, clip in enumerate(clips):
        for frame in range(5):
            clip[place % 3, frame, 4:10, 1 + frame + place % 2 : 7 + frame + place % 2] = 0.8
    optimizer = torch.optim.AdamW(codec.parameters(), lr=3e-3)
    errors = []
    for _ in range(300):
        rebuilt, size = codec(clips, torch.zeros(8, 16, 2, 4, 4))
        loss = codec_loss(rebuilt, clips, size)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append((rebuilt - clips).square().mean().item())
    assert errors[-1] < 0.2 * errors[0]
