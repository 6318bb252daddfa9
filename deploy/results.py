"""Save the storage block `releases`: the folder, or the volume mounted there, where all workers keep results.

    python deploy/results.py /results

Another storage block of that name, such as an S3 bucket, works as well.
"""

import sys

from prefect.filesystems import LocalFileSystem

LocalFileSystem(basepath=sys.argv[1]).save("releases", overwrite=True)
