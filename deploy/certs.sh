#!/usr/bin/env bash
# A private certificate authority, and a server's certificate from it.
#
#   certs.sh FOLDER NAME [NAME ...]
#
# NAME: each DNS name and each IP address by which the server is reached.
#
# FOLDER gets ca.pem (for the devices), ca.key (keep it off the server), server.pem and server.key. Run it again at any
# time: the authority stays, and the server's certificate is made anew when other names are given or it has less than 30
# days left. Private keys are readable by their owner alone. What was interrupted is done again by the next run.
set -euo pipefail
umask 077

readonly CA_DAYS=3650 SERVER_DAYS=397 MARGIN_SECONDS=$((30 * 24 * 3600))

fail() {
    echo "certs.sh: $1" >&2
    exit 2
}

[ $# -ge 2 ] || fail "expected a folder, then the server's names: certs.sh FOLDER NAME [NAME ...]"
command -v openssl > /dev/null || fail "openssl is not installed"
folder=$1
shift

names=""
for name in "$@"; do
    case $name in
        "" | *[!A-Za-z0-9.:*-]*) fail "'$name' is neither a DNS name nor an IP address" ;;
        *:*) kind=IP ;;
        *[!0-9.]*) kind=DNS ;;
        *) kind=IP ;;
    esac
    names+="${names:+,}$kind:$name"
done

mkdir -p "$folder" || fail "cannot write to $folder"
work=$(mktemp -d "$folder/.certs.XXXXXX")
trap 'rm -rf "$work"' EXIT

run() { # openssl's words are only of interest when it fails
    openssl "$@" 2> "$work/errors" || fail "openssl $1: $(tail -n 1 "$work/errors")"
}

lasts() {
    openssl x509 -in "$1" -noout -checkend "$MARGIN_SECONDS" > /dev/null
}

# A configuration of our own, since those of distributions add extensions that differ.
cat > "$work/config" << END
[req]
distinguished_name = subject
[subject]
[authority]
basicConstraints = critical, CA:TRUE, pathlen:0
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
[server]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
subjectAltName = $names
END

if [ ! -e "$folder/ca.pem" ]; then
    if [ ! -e "$folder/ca.key" ]; then
        run genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-384 -out "$work/ca.key"
        mv "$work/ca.key" "$folder/ca.key"
    fi
    run req -x509 -new -config "$work/config" -extensions authority -key "$folder/ca.key" -sha384 -days "$CA_DAYS" \
        -subj "/CN=LowSSL private authority" -out "$work/ca.pem"
    chmod 644 "$work/ca.pem"
    mv "$work/ca.pem" "$folder/ca.pem"
    echo "made $folder/ca.pem: give it to the devices, and keep ca.key off the server"
fi
lasts "$folder/ca.pem" || fail "$folder/ca.pem ends soon: move it and ca.key away, and give a new one to the devices"

if [ -e "$folder/server.names" ] && [ "$(cat "$folder/server.names")" = "$names" ] && lasts "$folder/server.pem" \
    && openssl verify -CAfile "$folder/ca.pem" "$folder/server.pem" > /dev/null 2>&1; then
    echo "$folder/server.pem is for these names and has more than 30 days left"
    exit 0
fi

[ -e "$folder/ca.key" ] || fail "a certificate takes $folder/ca.key, which is not there"
run genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$work/server.key"
run req -new -config "$work/config" -key "$work/server.key" -subj "/CN=LowSSL server" -out "$work/request"
run x509 -req -in "$work/request" -CA "$folder/ca.pem" -CAkey "$folder/ca.key" -set_serial "0x$(openssl rand -hex 16)" \
    -sha384 -days "$SERVER_DAYS" -extfile "$work/config" -extensions server -out "$work/server.pem"
chmod 644 "$work/server.pem"
printf '%s\n' "$names" > "$work/server.names"
rm -f "$folder/server.names" # with it, key and certificate belong together
mv "$work/server.key" "$folder/server.key"
mv "$work/server.pem" "$folder/server.pem"
mv "$work/server.names" "$folder/server.names"
echo "made $folder/server.pem and server.key for $names, good for $SERVER_DAYS days"
