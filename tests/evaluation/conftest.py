"""A folder of images and lists, for several files."""

import pytest
from support.image_folders import TEXTS


@pytest.fixture
def listed(tmp_path):
    """A folder with two prompt lists, and with a folder for images."""
    (tmp_path / "list.txt").write_text("\n".join(TEXTS) + "\n")
    (tmp_path / "twelve.txt").write_text("".join(f"thing {i}\n" for i in range(12)))
    (tmp_path / "images").mkdir()
    return tmp_path
