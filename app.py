"""Chat with a QWen model in the browser; a Space on the Hub runs this file.

    python app.py --checkpoint FOLDER

Installed, the same program is called `qwen1-browser`. Its command line is in `browser/commands.py`.
"""

from qwen1_commands import browser as main

if __name__ == "__main__":
    main()
