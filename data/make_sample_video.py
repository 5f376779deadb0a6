"""Make sample_video.mp4: a camera that moves over a photo of a cat.

The photo is Chelsea (451x300 pixels), in the public domain (CC0) and shipped with scikit-image; see README.md
beside this file. Every frame is a window of the photo, 4:3. Its centre and size change smoothly; it is scaled to
640x480 and encoded as H.264, which every camera, browser and OpenCV build reads.

    python data/make_sample_video.py [OUTPUT]
"""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import cv2
import imageio_ffmpeg
import numpy as np
import numpy.typing as npt
import skimage.data

WIDTH, HEIGHT = 640, 480
FPS = 25
SECONDS = 15

Image = npt.NDArray[np.uint8]


def frames(photo: Image) -> Iterator[Image]:
    """Yield the clip's frames, (HEIGHT, WIDTH, 3) RGB, from a photo, (height, width, 3) RGB."""
    photo_height, photo_width = photo.shape[:2]
    for index in range(FPS * SECONDS):
        t = index / FPS
        # A window of 80 to 100 % of the photo's height; it moves over the whole width and height of the photo.
        height = photo_height * (0.9 + 0.1 * math.cos(2 * math.pi * t / 7))
        width = height * WIDTH / HEIGHT
        left = (photo_width - width) * (0.5 + 0.5 * math.sin(2 * math.pi * t / 9))
        top = (photo_height - height) * (0.5 + 0.5 * math.sin(2 * math.pi * t / 5))
        # One affine map crops and scales at once, at fractions of a pixel, so that slow movement is smooth.
        scale = WIDTH / width
        transform = np.array([[scale, 0, -left * scale], [0, scale, -top * scale]])
        frame = cv2.warpAffine(
            photo, transform, (WIDTH, HEIGHT), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE
        )
        yield frame.astype(np.uint8, copy=False)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make the sample clip.")
    parser.add_argument("output", nargs="?", type=Path, default=Path(__file__).with_name("sample_video.mp4"))
    args = parser.parse_args(argv)

    # Browsers and streaming readers expect yuv420p and the index at the start.
    writer = imageio_ffmpeg.write_frames(
        str(args.output),
        (WIDTH, HEIGHT),
        fps=FPS,
        codec="libx264",
        quality=None,
        output_params=["-crf", "23", "-movflags", "+faststart"],
    )
    writer.send(None)
    for frame in frames(skimage.data.chelsea()):
        writer.send(np.ascontiguousarray(frame))
    writer.close()
    print(f"{args.output}: {FPS * SECONDS} frames, {args.output.stat().st_size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
