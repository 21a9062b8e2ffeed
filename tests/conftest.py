import os

os.environ["OMP_NUM_THREADS"] = "1"  # ranks are forked from the test's process
os.environ["HF_HUB_OFFLINE"] = "1"

from hypothesis import settings

settings.register_profile("plait", deadline=None)  # a shared machine's clock proves nothing
settings.load_profile("plait")
