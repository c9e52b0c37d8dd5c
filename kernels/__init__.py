"""The maths of DeepSeek sparse attention: one public function an operation."""
