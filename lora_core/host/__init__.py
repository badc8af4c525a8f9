"""The bridge to ComfyUI: the only modules that import comfy, folder_paths or server."""
