"""The device that the stand-in claims to be on."""

import os


class current_platform:
    device_type = os.environ.get("FAKE_VLLM_DEVICE", "cpu")
