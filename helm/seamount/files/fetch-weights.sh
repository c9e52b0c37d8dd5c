# Fetches the files of $SUMS (lines of "SHA-256  file") from $BASE_URL into $TARGET and checks each one. Files that are
# whole stay as they are, those that match the pattern $SKIP are left out. Ends with 1 at the first that differs.
cd "$TARGET"
while read -r sum file; do
  [ -n "$file" ] || continue
  # shellcheck disable=SC2254  # $SKIP is a pattern
  case "$file" in $SKIP) continue ;; esac
  if [ -f "$file" ] && echo "$sum  $file" | sha256sum -c --status -; then continue; fi
  mkdir -p "$(dirname "$file")"
  echo "weights: fetching $file"
  python3 -c '
import shutil, sys, urllib.request
with urllib.request.urlopen(sys.argv[1], timeout=60) as source, open(sys.argv[2], "wb") as target:
    shutil.copyfileobj(source, target, 1 << 22)
' "$BASE_URL/$file" "$file.part"
  if ! echo "$sum  $file.part" | sha256sum -c --status -; then
    rm -f "$file.part"
    echo "weights: $file is not what weights.download.sha256 says" >&2
    exit 1
  fi
  mv "$file.part" "$file"
done <"$SUMS"
