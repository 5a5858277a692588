# Set-up: fetches the course, and installs what Colab or Kaggle lacks. Safe to run twice; elsewhere it changes nothing.
import importlib.util, runpy, subprocess, zipfile
from pathlib import Path

repository, here = "GITHUB_REPOSITORY", Path.cwd()  # owner/name on GitHub; empty: the course comes as a zip


def find_course():  # installed, here or above, one folder below, in a mounted Google Drive, or among Kaggle's inputs
    package = importlib.util.find_spec("qlora_helpers")
    places = [Path(package.origin).parents[1]] if package and package.origin else []
    places += [here, *here.parents, *here.glob("*"), here / "drive/MyDrive/qlora-course"]
    places += [place for depth in range(1, 5) for place in here.parent.glob("input/" + "*/" * depth)]
    return next((place for place in places if (place / "colab/setup.py").is_file()), None)


for file in [*here.glob("*.zip"), *here.glob("drive/MyDrive/qlora-course*.zip")]:
    if not find_course() and zipfile.is_zipfile(file) and "qlora_helpers/" in str(zipfile.ZipFile(file).namelist()):
        zipfile.ZipFile(file).extractall(here)
if not find_course() and repository:
    subprocess.run(["git", "clone", "--quiet", "--depth=1", f"https://github.com/{repository}", "qlora-course"])
if not find_course():
    cure = "upload qlora-course.zip beside this notebook (Kaggle: as a dataset), wait until it is complete"
    fetched = f", nor could https://github.com/{repository} be fetched (no Internet?)" if repository else ""
    raise FileNotFoundError(f"The course is not here{fetched}: {cure}, and run this cell again.")
set_up = runpy.run_path(str(find_course() / "colab/setup.py"), run_name="__main__")
