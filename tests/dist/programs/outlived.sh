#!/bin/sh
# outlived.sh FOLDER RANKS PROGRAM...: runs the program, and ends when the programs of all ranks have, so that no
# launcher ends the others because one has failed. Leaves what each wrote to stderr, and its exit status.
folder=$1 ranks=$2
shift 2
"$@" 2> "$folder/$$.stderr"
echo $? > "$folder/$$.status"
until [ "$(ls "$folder" | grep -c status)" -eq "$ranks" ]; do sleep 0.02; done
