# Set-up: installs on Colab and Kaggle what they lack, and does nothing elsewhere. Safe to run twice.
import importlib.util, subprocess, sys
from pathlib import Path

if importlib.util.find_spec("qlora_helpers") is None:
    repository = "GITHUB_REPOSITORY"  # owner/name; empty: unpack the course's zip here, or keep it in your Drive
    places = [Path.cwd() / "qlora-course", Path("/content/drive/MyDrive/qlora-course"), *Path.cwd().parents]
    course = next((place for place in places if (place / "qlora_helpers").is_dir()), None)
    if course is None and repository:
        course = Path.cwd() / "qlora-course"
        subprocess.run(["git", "clone", "--depth", "1", f"https://github.com/{repository}", str(course)], check=True)
    if course is None:
        raise FileNotFoundError("The course is not here: upload its zip, unpack it as qlora-course, and run this again.")
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "-r", str(course / "colab" / "requirements.txt")], check=True)
    sys.path.insert(0, str(course))

import torch

print("Set-up is complete." if torch.cuda.is_available() else "Set-up is complete. There is no GPU: the cpu gear runs.")
