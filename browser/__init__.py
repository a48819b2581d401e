"""The demo in the browser: `commands` starts it, `page` lays it out, `conversation` asks the model."""
