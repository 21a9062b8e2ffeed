from envs.fixtures import bare, commands, contained, image, scratch

__all__ = ["bare", "commands", "contained", "image", "scratch"]
