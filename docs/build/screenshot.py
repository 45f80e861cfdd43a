"""Makes docs/images/report.png: measures, writes the report, and has Chromium draw its top.

python docs/build/screenshot.py
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

PICTURE = Path(__file__).parents[1] / "images" / "report.png"
SIZE = 1280, 1430
SMALL = ("--batch-size", "64")
COMMANDS = (
    ("measure", "--quantizer", "ptq,bhq", "--draws", "32", *SMALL),
    ("profile", "--quantizer", "bhq", "--precision", "0.15", *SMALL),
    ("report", "runs/measure-ptq@5-and-1-more", "runs/profile-bhq@5", "--out", "report.html"),
)


def main():
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        sys.exit("expected Chromium, found none; apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder:
        for words in COMMANDS:
            subprocess.run([sys.executable, "-m", "fqtstats", *words], cwd=folder, check=True)
        size = f"--window-size={SIZE[0]},{SIZE[1]}"
        options = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", size, "--screenshot=shot.png")
        subprocess.run([browser, *options, f"file://{folder}/report.html"], cwd=folder, check=True)
        # Few colours: the file is a third of the size.
        Image.open(Path(folder) / "shot.png").convert("RGB").quantize(128).save(PICTURE, optimize=True)


if __name__ == "__main__":
    main()
