"""Pictures of the kinds that cameras and editors make and demo data never has.

    python tests/reference/odd_pictures.py                # writes tests/training/odd

All show the same in 96 x 72: red, green, blue and white quarters, or four greys. `rotated.jpg` is stored lying on its side, with the EXIF
orientation that says so.
"""
from pathlib import Path

import numpy as np
from PIL import Image

OUT = Path(__file__).resolve().parents[2] / "tests/training/odd"
SIZE = (96, 72)
COLOURS = [(250, 10, 10), (10, 250, 10), (10, 10, 250), (255, 255, 255)]


def quarters():
    w, h = SIZE
    image = Image.new("RGB", SIZE)
    for i, colour in enumerate(COLOURS):
        x, y = i % 2 * w // 2, i // 2 * h // 2
        image.paste(colour, (x, y, x + w // 2, y + h // 2))
    return image


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    image = quarters()
    image.convert("CMYK").save(OUT / "cmyk.jpg", quality=95)
    exif = Image.Exif()
    exif[0x0112] = 6                                      # stored turned: turn right to see it
    image.transpose(Image.Transpose.ROTATE_90).save(OUT / "rotated.jpg", quality=95, exif=exif)
    image.convert("L").save(OUT / "grey.jpg", quality=95)
    image.convert("P", palette=Image.Palette.ADAPTIVE).save(OUT / "palette.png")
    clear = image.convert("RGBA")
    w, h = SIZE
    clear.paste((0, 0, 0, 0), (w // 2, h // 2, w, h))     # transparent black, to be seen as white
    clear.save(OUT / "transparent.png")
    clear.save(OUT / "transparent.webp", lossless=True)
    sixteen = np.array([[0, 20000], [40000, 65535]], np.uint16).repeat(h // 2, axis=0).repeat(w // 2, axis=1)
    Image.fromarray(sixteen).save(OUT / "sixteen.png")
    other = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image.save(OUT / "animated.png", save_all=True, append_images=[other], duration=100)
    image.save(OUT / "animated.webp", save_all=True, append_images=[other], duration=100)


if __name__ == "__main__":
    main()
