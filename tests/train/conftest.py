import io

import pytest
from PIL import Image


@pytest.fixture
def png():
    """A maker of small gradient pictures, encoded."""

    def make(width, height):
        picture = Image.linear_gradient("L").resize((width, height)).convert("RGB")
        file = io.BytesIO()
        picture.save(file, "png")
        return file.getvalue()

    return make
