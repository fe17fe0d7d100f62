"""Drawing a face: eight fixed people, and what motion does to them. All lengths are parts of the picture's side."""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Motion = dict[str, float]
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Identity:
    """The fixed look of one drawn person."""

    skin: Colour
    hair: Colour
    hair_style: str  # short, long, bun, bald, side
    eye: Colour
    lips: Colour
    shirt: Colour
    back: Colour
    face_w: float
    face_h: float
    eye_gap: float
    brow: float
    nose: float
    mouth_w: float
    glasses: bool = False
    beard: bool = False


# fmt: off
IDENTITIES = {
    "id01": Identity((236, 188, 160), (60, 40, 28), "short", (70, 110, 150), (196, 96, 92),
                     (52, 84, 140), (186, 204, 214), .205, .265, .086, .011, .050, .074),
    "id02": Identity((141, 85, 60), (26, 20, 18), "bun", (60, 40, 30), (142, 62, 66),
                     (196, 150, 40), (214, 196, 178), .190, .260, .080, .009, .046, .080),
    "id03": Identity((246, 208, 184), (196, 148, 80), "long", (88, 134, 96), (212, 104, 110),
                     (150, 60, 96), (196, 214, 196), .188, .252, .082, .008, .044, .070),
    "id04": Identity((198, 142, 106), (30, 26, 26), "side", (70, 48, 30), (164, 84, 78),
                     (60, 110, 88), (204, 198, 220), .200, .270, .084, .013, .054, .078, False, True),
    "id05": Identity((224, 172, 140), (170, 170, 168), "short", (90, 100, 112), (176, 96, 92),
                     (88, 88, 96), (168, 188, 206), .208, .262, .088, .012, .056, .072, True),
    "id06": Identity((104, 62, 44), (20, 16, 16), "bald", (48, 32, 24), (118, 56, 58),
                     (180, 60, 52), (220, 210, 190), .202, .258, .085, .012, .058, .084, False, True),
    "id07": Identity((232, 190, 150), (22, 20, 24), "long", (50, 36, 28), (196, 88, 96),
                     (70, 130, 160), (222, 204, 204), .194, .246, .080, .009, .042, .068, True),
    "id08": Identity((250, 214, 192), (164, 74, 36), "side", (72, 128, 140), (208, 110, 104),
                     (44, 60, 72), (206, 216, 176), .196, .256, .083, .010, .048, .074),
}
# fmt: on


def shade(colour: Colour, factor: float) -> Colour:
    """Brighter or darker."""
    red, green, blue = (int(max(0, min(255, part * factor))) for part in colour)
    return red, green, blue


def ellipse(
    cx: float, cy: float, rx: float, ry: float, count: int = 48, start: float = 0.0, end: float = 2 * math.pi
) -> np.ndarray:
    """Points (count, 2) on an arc."""
    angle = np.linspace(start, end, count)
    return np.stack([cx + rx * np.cos(angle), cy + ry * np.sin(angle)], 1)


class Face:
    """One identity, drawn at a given motion. Drawn larger and scaled down, so that edges are smooth."""

    def __init__(self, identity: Identity, size: int = 256, oversample: int = 2):
        self.look, self.size, self.side = identity, size, size * oversample
        y, x = np.mgrid[0 : self.side, 0 : self.side] / self.side
        back = np.array(identity.back)[None, None] * (1.08 - 0.35 * np.hypot(x - 0.4, y - 0.3))[..., None]
        self.back = Image.fromarray(np.clip(back, 0, 255).astype(np.uint8))
        light = 1.10 - 0.55 * np.clip(np.hypot((x - 0.44) / 0.9, (y - 0.40) / 1.1) - 0.05, 0, 1)
        self.light = light[..., None]

    # --- geometry -----------------------------------------------------------------------------------------------------

    def points(self, motion: Motion, points: np.ndarray | list, depth: float = 0.0) -> np.ndarray:
        """Face points, relative to the head's centre, to picture points.

        Turning the head moves a point in proportion to its depth; then the head rolls around its centre.
        """
        points = np.atleast_2d(np.asarray(points, float))
        yaw, pitch, roll = (math.radians(motion[name]) for name in ("yaw", "pitch", "roll"))
        x = points[:, 0] * math.cos(yaw) + depth * math.sin(yaw)
        y = points[:, 1] * math.cos(pitch) + depth * math.sin(pitch)
        cos, sin = math.cos(roll), math.sin(roll)
        return np.stack([0.5 + motion["shift_x"] + cos * x - sin * y, 0.47 + motion["shift_y"] + sin * x + cos * y], 1)

    def mouth(self, motion: Motion) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, float, float]:
        """Outer top, outer low, inner top, inner low outline in face points; the gap between the inner lips; half the
        width.
        """
        opening = motion["mouth_open"]
        half = self.look.mouth_w * (0.80 + 0.36 * motion["mouth_wide"]) * (1 - 0.10 * opening)
        gap, lift, centre, lip_top, lip_low = 0.072 * opening, -0.020 * motion["smile"], 0.132, 0.013, 0.017
        t = np.linspace(-1, 1, 25)
        arch, corner = 1 - t**2, centre + lift * t**2
        bow = 1 - 0.22 * np.exp(-((t / 0.16) ** 2))
        inner_top = np.stack([half * 0.92 * t, corner - 0.32 * gap * arch], 1)
        inner_low = np.stack([half * 0.92 * t, corner + 0.68 * gap * arch], 1)
        outer_top = np.stack([half * t, corner - (0.32 * gap + lip_top * bow) * arch**0.8], 1)
        outer_low = np.stack([half * t, corner + (0.68 * gap + lip_low) * arch**0.7], 1)
        return outer_top, outer_low, inner_top, inner_low, gap, half

    # --- painting -----------------------------------------------------------------------------------------------------

    def _polygon(self, draw: ImageDraw.ImageDraw, points: np.ndarray, fill: Colour | int) -> None:
        draw.polygon([tuple(point) for point in points * self.side], fill=fill)

    def _line(self, draw: ImageDraw.ImageDraw, points: np.ndarray, fill: Colour, width: float) -> None:
        draw.line(
            [tuple(point) for point in points * self.side],
            fill=fill,
            width=max(1, int(width * self.side)),
            joint="curve",
        )

    def _inside(self, image: Image.Image, outline: np.ndarray, paint) -> None:
        """Let `paint(draw)` draw, and keep what lies within the outline."""
        mask = Image.new("L", (self.side, self.side), 0)
        self._polygon(ImageDraw.Draw(mask), outline, 255)
        layer = image.copy()
        paint(ImageDraw.Draw(layer))
        image.paste(layer, (0, 0), mask)

    def draw(self, motion: Motion) -> tuple[Image.Image, dict[str, float]]:
        """The picture, and the true places of the lips in its pixels."""
        image = self.back.copy()
        self._behind(ImageDraw.Draw(image), motion)
        self._head(ImageDraw.Draw(image), motion)
        for side in (-1, 1):
            self._eye(image, motion, side)
        self._nose_and_bridge(ImageDraw.Draw(image), motion)
        self._mouth(image, motion)
        lit = np.asarray(image, np.float32) * self.light
        image = Image.fromarray(np.clip(lit, 0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.6))
        return image.resize((self.size, self.size), Image.Resampling.LANCZOS), self._truth(motion)

    def _behind(self, draw: ImageDraw.ImageDraw, motion: Motion) -> None:
        """Hair behind the head; shoulders and neck, which do not turn with it; ears."""
        look = self.look
        w, h, dark = look.face_w, look.face_h, shade(look.hair, 0.8)
        if look.hair_style in ("long", "bun"):
            self._polygon(draw, self.points(motion, ellipse(0, -0.03, w * 1.22, h * 1.08), -0.05), dark)
        if look.hair_style == "long":
            self._polygon(
                draw,
                self.points(motion, [(-w * 1.2, -0.02), (w * 1.2, -0.02), (w * 1.25, 0.34), (-w * 1.25, 0.34)], -0.05),
                dark,
            )
        if look.hair_style == "bun":
            self._polygon(draw, self.points(motion, ellipse(0, -h * 1.12, 0.085, 0.075), -0.08), look.hair)
        x = 0.5 + 0.5 * motion["shift_x"]
        self._polygon(draw, ellipse(x, 1.06, 0.43, 0.27), look.shirt)
        neck = [(x - 0.085, 0.66), (x + 0.085, 0.66), (x + 0.10, 0.86), (x, 0.90), (x - 0.10, 0.86)]
        self._polygon(draw, np.array(neck), shade(look.skin, 0.80))
        for side in (-1, 1):
            self._polygon(
                draw, self.points(motion, ellipse(side * w, 0.02, 0.028, 0.052), -0.03), shade(look.skin, 0.88)
            )

    def _head(self, draw: ImageDraw.ImageDraw, motion: Motion) -> None:
        """Skull and jaw, which drops with the mouth; beard, cheeks, front hair."""
        look, jaw = self.look, 0.030 * motion["mouth_open"]
        w, h = look.face_w, look.face_h
        angle = np.linspace(0, 2 * math.pi, 72)
        below = np.sin(angle) > 0
        x = w * np.cos(angle) * np.where(below, 1 - 0.16 * np.sin(angle) ** 2, 1)
        y = h * np.sin(angle) + np.where(below, jaw * np.sin(angle) ** 2, 0)
        outline = np.stack([x, y], 1)
        self._polygon(draw, self.points(motion, outline), look.skin)
        if look.beard:
            keep = np.sin(angle) > 0.18
            inner = np.stack([x * 0.62, y * 0.40 + 0.055], 1)[keep][::-1]
            mixed = tuple(0.55 * np.array(look.skin) + 0.45 * np.array(look.hair))
            self._polygon(draw, self.points(motion, np.concatenate([outline[keep], inner])), shade(mixed, 0.95))
        for side in (-1, 1):
            red, green, blue = (int(0.9 * c + 0.1 * r) for c, r in zip(look.skin, (230, 90, 80), strict=True))
            self._polygon(
                draw, self.points(motion, ellipse(side * 0.105, 0.07, 0.040, 0.028), 0.05), (red, green, blue)
            )
        if look.hair_style != "bald":
            edge_y = -h * (0.60 if look.hair_style == "short" else 0.52)
            top = ellipse(0, -0.012, w * 1.05, h * 1.06, 40, math.pi * 1.06, math.pi * 1.94)
            dip = {"short": 0.0, "side": 0.055, "long": 0.02, "bun": -0.01}[look.hair_style]
            t = np.linspace(1, -1, 20)
            edge = np.stack([t * w * 0.93, edge_y + 0.035 * t**2 + dip * np.clip(t + 0.3, 0, 1)], 1)
            self._polygon(draw, self.points(motion, np.concatenate([top, edge]), 0.01), look.hair)

    def _eye(self, image: Image.Image, motion: Motion, side: int) -> None:
        """Socket, white, iris, lid, brow and glasses of one side."""
        look, draw = self.look, ImageDraw.Draw(image)
        x, y = side * look.eye_gap, -0.028
        opening = max(0.06, motion["eye_open"] * (1 - motion["blink"]))
        self._polygon(draw, self.points(motion, ellipse(x, y, 0.040, 0.029), 0.06), shade(look.skin, 0.90))
        white = self.points(motion, ellipse(x, y, 0.033, 0.0195 * opening), 0.06)
        self._polygon(draw, white, (248, 246, 242))
        if opening > 0.15:
            gx, gy = x + 0.010 * motion["gaze_x"], y + 0.006 * motion["gaze_y"]

            def iris(layer: ImageDraw.ImageDraw) -> None:
                for cx, cy, radius, colour in (
                    (gx, gy, 0.0165, look.eye),
                    (gx, gy, 0.0080, (16, 14, 14)),
                    (gx - 0.005, gy - 0.006, 0.0035, (255, 255, 255)),
                ):
                    self._polygon(layer, self.points(motion, ellipse(cx, cy, radius, radius), 0.06), colour)

            self._inside(image, white, iris)
            draw = ImageDraw.Draw(image)
        lid = ellipse(x, y, 0.034, 0.0205 * opening, 24, math.pi, 2 * math.pi)
        self._line(draw, self.points(motion, lid, 0.06), shade(look.hair, 0.5), 0.006)
        t = np.linspace(0, 1, 12)  # from the inner to the outer end of the brow
        brow_x = side * (look.eye_gap - 0.034 + 0.074 * t)
        brow_y = (
            -0.074 - 0.020 * motion["brow"] + 0.018 * motion["brow_tilt"] * (1 - 1.6 * t) - 0.010 * np.sin(math.pi * t)
        )
        colour = (30, 24, 22) if look.hair_style == "bald" else shade(look.hair, 0.75)
        self._line(draw, self.points(motion, np.stack([brow_x, brow_y], 1), 0.06), colour, look.brow)
        if look.glasses:
            ring = ellipse(x, y + 0.004, 0.052, 0.044)
            self._line(draw, self.points(motion, np.concatenate([ring, ring[:1]]), 0.075), (40, 40, 46), 0.006)

    def _nose_and_bridge(self, draw: ImageDraw.ImageDraw, motion: Motion) -> None:
        look, n = self.look, self.look.nose
        if look.glasses:
            bridge = [(-look.eye_gap + 0.052, -0.026), (look.eye_gap - 0.052, -0.026)]
            self._line(draw, self.points(motion, bridge, 0.08), (40, 40, 46), 0.006)
        ridge = [(-0.006, -0.02), (0.006, -0.02), (0.45 * n, 0.062), (-0.45 * n, 0.062)]
        self._polygon(draw, self.points(motion, ridge, 0.09), shade(look.skin, 0.95))
        self._line(
            draw,
            self.points(motion, ellipse(0, 0.060, 0.42 * n, 0.014, 16, 0, math.pi), 0.10),
            shade(look.skin, 0.72),
            0.005,
        )

    def _mouth(self, image: Image.Image, motion: Motion) -> None:
        """Lips, and behind them the dark of the mouth with teeth and tongue."""
        draw, look = ImageDraw.Draw(image), self.look
        outer_top, outer_low, inner_top, inner_low, gap, half = self.mouth(motion)
        self._polygon(draw, self.points(motion, np.concatenate([outer_top, outer_low[::-1]]), 0.06), look.lips)
        if gap <= 0.002:
            self._line(draw, self.points(motion, inner_top, 0.06), shade(look.lips, 0.6), 0.005)
            return
        hole = self.points(motion, np.concatenate([inner_top, inner_low[::-1]]), 0.06)
        self._polygon(draw, hole, (58, 18, 20))
        show = min(0.016, gap * (0.25 + 0.5 * motion["teeth"]))
        narrowed = inner_top * (0.9, 1)

        def within(layer: ImageDraw.ImageDraw) -> None:
            teeth = np.concatenate([narrowed, (narrowed + (0, show))[::-1]])
            self._polygon(layer, self.points(motion, teeth, 0.06), (240, 236, 226))
            tongue = ellipse(0, 0.132 + 0.62 * gap, half * 0.55, 0.26 * gap)
            self._polygon(layer, self.points(motion, tongue, 0.06), (170, 70, 74))

        self._inside(image, hole, within)

    def _truth(self, motion: Motion) -> dict[str, float]:
        """Corners and inner lips in pixels of the picture, and the distances between them."""
        _, _, top, low, _, _ = self.mouth(motion)
        middle = len(top) // 2
        left, right, upper, lower = self.points(motion, [top[0], top[-1], top[middle], low[middle]], 0.06) * self.size
        named = {"mouth_left": left, "mouth_right": right, "lip_top": upper, "lip_low": lower}
        places = {f"{name}_{axis}": point[index] for name, point in named.items() for index, axis in enumerate("xy")}
        return places | {
            "mouth_open_px": float(np.hypot(*(lower - upper))),
            "mouth_width_px": float(np.hypot(*(right - left))),
        }
