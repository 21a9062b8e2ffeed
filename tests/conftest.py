from hypothesis import settings

settings.register_profile("plait", deadline=None)  # a shared machine's clock proves nothing
settings.load_profile("plait")
